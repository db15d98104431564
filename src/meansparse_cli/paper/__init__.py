"""The tables of the paper: its cells and claims (``tables.yaml``), the commands behind ours, and the pages.

Read ``tables.yaml`` first. ``plan`` turns it into commands, ``results`` reads what they left, ``fill`` puts it beside
the paper's cells, ``claims`` judges what the paper says of them, ``page`` writes it down.
"""
