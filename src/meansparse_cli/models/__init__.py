"""From a name on the command line to a network with its weights.

Read ``kind`` first: what every kind of model answers. ``source`` lists the kinds, ``fetch`` gets their weights; a new
kind is a subclass, and a line in ``source.KINDS``.
"""
