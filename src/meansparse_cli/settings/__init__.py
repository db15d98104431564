"""What can be set: each option is a field with its limits and default; ``commands.yaml`` says how its help shows it.

Read ``commands.yaml`` first: every command, its settings and its options. ``stages`` and ``training`` are the settings of
the stages, ``values`` how a value is written, ``resolve`` who wins: flag, file, environment, default.
"""
