"""One doubt about an evaluation, and what the checks that raise it are given."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..attacks.counting import CountedModel, device_of
from ..attacks.losses import Loss
from ..attacks.result import Budget
from ..engine.evaluation import ModelName
from ..operator.float32 import full_float32
from ..operator.sparsify import SparsifiedModel, backward_rule

Status = Literal["pass", "warn", "not run"]
Unit = Literal["share", "points", "count", "number"]

CARLINI = "Carlini et al. 2019, arXiv 1902.06705"
AUTOATTACK = "AutoAttack's flags, checks.py and flags_doc.md"
PINTOR = "Pintor et al. 2022, arXiv 2106.09947"
OWN = "meansparse's own"


@dataclass(frozen=True)
class Doubt:
    """A reason not to believe a number, and whether it holds.

    ``value`` is compared with ``limit``: above it (below it where ``at_least``) the status is ``warn``. ``unit``: a
    ``share`` in [0, 1], a difference of accuracies (``points``, as a fraction), a ``count``, or a plain ``number``.
    ``source``: who asks for this check, and whose the limit is. ``details``: further numbers, plain values.
    """

    name: str
    model: ModelName
    status: Status
    value: float | None
    limit: float
    unit: Unit
    sentence: str
    source: str
    at_least: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def to_report(self) -> dict[str, Any]:
        """Plain values; numbers to six figures, so that equal runs give equal reports."""
        row = asdict(self)
        row["value"] = None if self.value is None else _rounded(self.value)
        row["details"] = {key: _rounded(value) for key, value in self.details.items()}
        return row


@dataclass(frozen=True)
class Check:
    """What a doubt is called, where its limit lies and who asks for it; ``at_least``: the limit is a least value."""

    name: str
    limit: float
    unit: Unit
    source: str
    at_least: bool = False

    def judged(self, subject: "Subject", value: float, sentence: str, **details: Any) -> Doubt:
        """``pass`` or ``warn``, by ``value``; one that is not a number is a warning."""
        holds = value >= self.limit if self.at_least else value <= self.limit
        return self._doubt(subject, "pass" if holds else "warn", value, sentence, details)

    def not_run(self, subject: "Subject", sentence: str) -> Doubt:
        """There is no value, and the sentence says why."""
        return self._doubt(subject, "not run", None, sentence, {})

    def _doubt(
        self, subject: "Subject", status: Status, value: float | None, sentence: str, details: dict[str, Any]
    ) -> Doubt:
        return Doubt(
            self.name, subject.name, status, value, self.limit, self.unit, sentence, self.source, self.at_least, details
        )


@dataclass(frozen=True)
class Subject:
    """One model and the examples it is doubted on; ``model`` has its alpha already, in evaluation mode.

    ``x`` (n, channels, height, width) float32 in [0, 1]; ``y``, ``indices`` (n,) int64; ``correct`` (n,) bool: right at
    the clean image; ``robust`` (n,) bool: right under every attack of the evaluation. ``bpda``: were there attacks whose
    gradients pass straight through the operator? ``broken_by``: what a check itself broke inside the budget, pairs of
    positions (m,) and images (m, channels, height, width), on the CPU.
    """

    name: ModelName
    model: SparsifiedModel
    x: Tensor
    y: Tensor
    indices: Tensor
    correct: Tensor
    robust: Tensor
    bpda: bool
    budget: Budget
    seed: int
    batch_size: int
    n_classes: int
    broken_by: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def keep(self, rows: Tensor, images: Tensor) -> None:
        """Remember ``images`` (m, ...), which break the examples at ``rows`` (m,) inside the budget."""
        self.broken_by.append((rows.cpu(), images.detach().float().cpu()))

    @property
    def rule(self) -> str:
        """The backward rule of the strongest attacks that were run."""
        return "identity" if self.bpda else "true"

    def counted(self) -> CountedModel:
        """The model with its outputs checked."""
        return CountedModel(self.model, n_classes=self.n_classes, device=device_of(self.model, self.x.device))

    def logits(self, images: Tensor, batch_size: int | None = None) -> Tensor:
        """(m, channels, height, width) -> (m, n_classes), as the judge sees them; without a check of their values."""
        with torch.no_grad(), full_float32(device_of(self.model, images.device)):
            return torch.cat(
                [self.model(part.contiguous()).float() for part in images.split(batch_size or self.batch_size)]
            )

    def gradients(self, loss: Loss, rule: str, rows: Tensor) -> Tensor:
        """Gradient of ``loss`` in the clean image, under a backward rule: (m, channels, height, width)."""
        counted, parts = self.counted(), []
        with backward_rule(self.model, rule), full_float32(counted.device):
            for part in rows.split(self.batch_size):
                point, y = self.x[part].contiguous().requires_grad_(), self.y[part]
                with torch.enable_grad():
                    value = loss(counted(point), y, y).sum()
                parts.append(torch.autograd.grad(value, point)[0].detach())
        return torch.cat(parts) if parts else self.x[:0]


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
