"""What the checks are given: one model, and the examples it was evaluated on."""

from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor

from ..attacks.judge import CountedModel, judge, logits
from ..attacks.losses import Loss
from ..attacks.problem import Problem
from ..data.examples import Examples
from ..engine.outcomes import ModelName
from ..operator.active import backward_rule
from ..operator.device import device_of, full_float32
from ..operator.insertion import SparsifiedModel


@dataclass(frozen=True)
class Subject:
    """One model and n examples; the model of ``problem`` has its alpha already, in evaluation mode.

    ``correct`` (n,) bool: correct at the clean image; ``robust`` (n,) bool: correct under every attack that was run.
    ``bpda``: were there attacks whose gradients pass straight through the operator? ``broken_by``: what a check itself
    broke inside the budget, pairs of positions (m,) and images (m, channels, height, width), on the CPU.
    """

    name: ModelName
    problem: Problem
    examples: Examples
    correct: Tensor
    robust: Tensor
    bpda: bool
    broken_by: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def model(self) -> SparsifiedModel:
        """The model itself."""
        return cast(SparsifiedModel, self.problem.model)

    @property
    def x(self) -> Tensor:
        """The clean images, (n, channels, height, width)."""
        return self.examples.x

    @property
    def y(self) -> Tensor:
        """Their classes, (n,) int64."""
        return self.examples.y

    @property
    def rule(self) -> str:
        """The backward rule of the strongest attacks that were run."""
        return "identity" if self.bpda else "true"

    def keep(self, rows: Tensor, images: Tensor) -> None:
        """Remember ``images`` (m, ...), which break the examples at ``rows`` (m,) inside the budget."""
        self.broken_by.append((rows.cpu(), images.detach().float().cpu()))

    def counted(self) -> CountedModel:
        """The model with its outputs checked."""
        device = device_of(self.model, self.x.device)
        return CountedModel(self.model, n_classes=self.problem.n_classes, device=device)

    def logits(self, images: Tensor, batch_size: int | None = None) -> Tensor:
        """(m, channels, height, width) -> (m, n_classes), as the judge sees them."""
        return logits(replace(self.problem, batch_size=batch_size or self.problem.batch_size), images)

    def is_right(self, images: Tensor) -> Tensor:
        """Whether each of n images, one an example, is classified correctly: (n,) bool."""
        return ~judge(self.problem, images, self.y)

    def gradients(self, loss: Loss, rule: str, rows: Tensor) -> Tensor:
        """Gradient of ``loss`` in the clean image, under a backward rule: (m, channels, height, width)."""
        counted, parts = self.counted(), []
        with backward_rule(self.model, rule), full_float32(counted.device):
            for part in rows.split(self.problem.batch_size):
                point, y = self.x[part].contiguous().requires_grad_(), self.y[part]
                with torch.enable_grad():
                    value = loss(counted(point), y, y).sum()
                parts.append(torch.autograd.grad(value, point)[0].detach())
        return torch.cat(parts) if parts else self.x[:0]
