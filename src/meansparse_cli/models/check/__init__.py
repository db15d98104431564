"""``meansparse models --check``: does MeanSparse work on every entry of the zoo?

Read ``network`` first, the check of one network.
"""
