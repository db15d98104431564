"""The model and the budget that every attack is given, and the outcome that it returns."""

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ..errors import AttackError, ConfigError
from ..operator.device import Precision, device_of
from ..operator.fitting import fitting

Norm = Literal["Linf", "L2"]


@dataclass(frozen=True)
class Budget:
    """The perturbations allowed: ``norm(adversarial - image) <= eps`` in pixel units of [0, 1] images."""

    norm: Norm
    eps: float


@dataclass(frozen=True)
class Problem:
    """One model to attack, the budget, and what else outcomes and batches depend on.

    ``model`` takes (n, channels, height, width) images in [0, 1] and returns (n, n_classes) logits. It judges, in
    float32, and is searched itself unless there is a ``search_model``: ``model`` in a faster form (compiled) that
    shares its modules. ``precision`` is what a search computes in; None: whatever is set around the call. ``seed``
    fixes the random starts. ``batch_size``: images in a forward pass, at most; results do not depend on it.

    Raises ``ConfigError`` (unusable budget or batch size) and ``AttackError`` (fewer than two classes).
    """

    model: nn.Module
    budget: Budget
    n_classes: int
    seed: int
    batch_size: int
    precision: Precision | None = None
    search_model: nn.Module | None = None

    def __post_init__(self) -> None:
        budget = self.budget
        if budget.norm not in ("Linf", "L2"):
            raise ConfigError(f"norm {budget.norm!r} is not known", hint="Use Linf or L2.")
        if not (math.isfinite(budget.eps) and budget.eps >= 0) or (budget.norm == "Linf" and budget.eps > 1):
            raise ConfigError(
                f"eps = {budget.eps} cannot be used with norm {budget.norm}",
                hint="eps is in pixel units of [0, 1] images: 8/255, not 8.",
            )
        if self.batch_size < 1:
            raise ConfigError(f"batch size {self.batch_size} is below 1")
        if self.n_classes < 2:
            raise AttackError(f"a classifier of {self.n_classes} class cannot be attacked")

    @property
    def batch_that_fits(self) -> int:
        """``batch_size``, or less where the memory of a GPU is known to end before."""
        return fitting(self.model, self.batch_size)

    def device(self, default: torch.device) -> torch.device:
        """The device of the model's first parameter or buffer; ``default`` for a model without either."""
        return device_of(self.model, default)


@dataclass(frozen=True)
class AttackResult:
    """Outcome of one attack on n examples.

    ``adversarial`` (n, channels, height, width), float32, inside budget and [0, 1]; the clean image where the attack
    failed. ``broken`` (n,) bool: misclassified at ``adversarial``, judged afresh after the attack returned. ``passes``
    (n, 2) int64 on the CPU: forward and backward passes that each example took, or would have taken alone. ``rejected``
    (n,) int64 on the CPU: breaks that the judge did not confirm. ``n_in_vain``: backward passes for rows that left.
    """

    adversarial: Tensor
    broken: Tensor
    passes: Tensor
    rejected: Tensor
    seconds: float
    n_in_vain: int = 0

    @property
    def forward_passes(self) -> int:
        return int(self.passes[:, 0].sum())

    @property
    def backward_passes(self) -> int:
        return int(self.passes[:, 1].sum())


def search_form(model: nn.Module, *, compile: bool, channels_last: bool) -> nn.Module | None:
    """The model in the form that is searched, its values up to rounding; None: the model itself is searched.

    In channels-last its convolution weights are laid out anew, in place: their values stay, so the judge may use them.
    """
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return cast(nn.Module, torch.compile(model)) if compile else None
