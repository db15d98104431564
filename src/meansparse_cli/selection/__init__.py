"""Which alpha: the sweep over held-out images, and the rules that choose from its curve.

Read ``sweep`` first. ``choice`` is the rule for one alpha, ``racing`` drops alphas early, ``search`` looks for an alpha
for each stage or site; ``variants`` turns site rules and alphas into variants for ``measure``.
"""
