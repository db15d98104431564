"""What can be set: each option is declared once, with its help, default and unit.

Read ``commands`` first: every command, its settings and its options. ``stages`` and ``training`` are the settings of
the stages, ``values`` how a value is written, ``resolve`` who wins: flag, file, environment, default.
"""
