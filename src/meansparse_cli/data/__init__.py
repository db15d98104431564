"""Images: a data set by its name or path, its three disjoint splits, what tells one image from another.

Read ``splits`` first: which image belongs to which split is decided there, and never changes.
"""
