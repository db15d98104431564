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
    failed. ``broken`` (n,) bool: misclassified at ``adversarial``, judged afresh after the attack returned. ``passes``
    (n, 2) int64 on the CPU: forward and backward passes that each example took, or would have taken alone. ``rejected``
    (n,) int64 on the CPU: breaks that the attack claimed and the judge did not confirm; such an example is searched a
    second time, in full precision. ``n_in_vain``: backward passes that a batch took for examples that were leaving.
    """

    adversarial: Tensor
    broken: Tensor
    passes: Tensor
    rejected: Tensor
    seconds: float
    n_in_vain: int = 0

    @property
    def forward_passes(self) -> int:
        """Summed over the n examples."""
        return int(self.passes[:, 0].sum())

    @property
    def backward_passes(self) -> int:
        """Summed over the n examples."""
        return int(self.passes[:, 1].sum())
