"""What every attack takes and returns."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Norm = Literal["Linf", "L2"]


@dataclass(frozen=True)
class Budget:
    """The perturbations allowed: ``norm(adversarial - image) <= eps`` in pixel units of [0, 1] images."""

    norm: Norm
    eps: float


@dataclass(frozen=True)
class AttackResult:
    """Outcome of one attack on n examples.

    ``adversarial`` (n, channels, height, width), float32, inside budget and [0, 1]; the clean image where the attack
    failed. ``broken`` (n,) bool: misclassified at ``adversarial``, judged afresh after the attack returned.
    ``forward_passes`` and ``backward_passes`` count examples, summed over the n. ``rejected`` counts the breaks that
    the attack claimed and the judge did not confirm; those examples are searched a second time, in full precision.
    ``forward_passes_broken`` and ``backward_passes_broken``: the part of them that went to examples in ``broken``.
    """

    adversarial: Tensor
    broken: Tensor
    forward_passes: int
    backward_passes: int
    seconds: float
    seed: int
    rejected: int = 0
    forward_passes_broken: int = 0
    backward_passes_broken: int = 0
