"""The run folder: where a stage reads and writes, what it is given, and the chain of reports.

Read ``context`` first: each stage opens one ``RunContext``, which reads each file once. ``report`` is the YAML of a
stage and says when it was done before; ``operators`` puts the calibrated operators into the model.
"""
