"""What can be set: each option is a field with its limits and default; ``commands.yaml`` has what its help says.

Read ``commands.yaml`` first: every command, its settings and its options. ``stages`` and ``training`` are the settings
of the stages, ``values`` how a value is written, ``resolve`` who wins: flag, file, environment, default.
"""
