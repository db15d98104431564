"""What is attacked, on which examples, and what became of each: evaluations, sweeps and measurements stand on this.

Read ``cells`` first: through it every policy asks the model. ``evaluate`` is two models on every example, ``grid``
many variants on blocks of images; ``state`` and ``blocks`` keep what was found, ``outcomes`` says what it means.
"""
