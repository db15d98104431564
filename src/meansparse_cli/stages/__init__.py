"""The commands, a file each: open the run, one call into the library, write the report.

Read ``evaluate`` first; ``run`` is what the command line calls, with the run folder locked.
"""
