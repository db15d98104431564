"""Attacks on variants of a model and their outcomes, example by example: evaluations, sweeps, measurements.

Read ``cells`` first, the examples and variants of which every policy asks. ``evaluate`` is two models on every
example, ``grid`` many variants on blocks of images; ``state`` and ``blocks`` keep what was found, ``outcomes`` and
``comparison`` say what it means. ``witnesses`` writes files of adversarial examples, ``image_files`` reads them,
``verify`` checks them.
"""
