"""What all attacks on one model have in common."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import AttackError, ConfigError
from ..operator.device import device_of
from .precision import Precision
from .result import Budget


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

    def device(self, default: torch.device) -> torch.device:
        """The device of the model's first parameter or buffer; ``default`` for a model without either."""
        return device_of(self.model, default)
