"""What the checks are given: one model, and the examples it was evaluated on; and the form of what they find."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from typing import Any, Literal, cast

import torch
import yaml
from torch import Tensor

from ..attacks.judge import CountedModel, judge, logits
from ..attacks.losses import Loss
from ..attacks.problem import Problem
from ..data.examples import Examples
from ..engine.outcomes import ModelName
from ..operator.active import backward_rule
from ..operator.device import full_float32
from ..operator.insertion import SparsifiedModel

CHECKS: dict[str, dict[str, Any]] = yaml.safe_load((resources.files(__package__) / "checks.yaml").read_bytes())


@dataclass(frozen=True)
class Diagnostic:
    """What one check, of ``checks.yaml``, found on one model.

    ``value`` is compared with ``limit``: above it (below it where ``at_least``) the status is ``warn``. ``unit``: a
    ``share`` in [0, 1], a difference of accuracies (``points``, as a fraction), a ``count``, or a plain ``number``.
    ``source``: who asks for this check, and whose the limit is. ``details``: further numbers, plain values.
    """

    name: str
    model: ModelName
    status: Literal["pass", "warn", "too few", "not run"]
    value: float | None
    limit: float
    unit: Literal["share", "points", "count", "number"]
    sentence: str
    source: str
    at_least: bool = False
    details: dict[str, Any] = field(default_factory=dict)

    def to_report(self) -> dict[str, Any]:
        """Plain values; numbers to six figures, so that equal runs give equal reports."""
        return asdict(self) | {"value": _rounded(self.value), "details": _rounded(self.details)}


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
        return cast(SparsifiedModel, self.problem.model)

    @property
    def x(self) -> Tensor:
        """The clean images, (n, channels, height, width)."""
        return self.examples.x

    @property
    def y(self) -> Tensor:
        return self.examples.y

    def judged(
        self,
        check: str,
        value: float,
        words: Mapping[str, Any],
        details: dict[str, Any] | None = None,
        *,
        at_most: float | None = None,
    ) -> Diagnostic:
        """``pass`` or ``warn``, by ``value``; one that is not a number is a warning.

        ``words``, ``details`` and ``value`` fill the sentence of the check. ``at_most``: what the value may be on more
        examples; above the limit, a pass is ``too few``: these cannot tell.
        """
        about, details = CHECKS[check], details or {}
        holds = value >= about["limit"] if about.get("at_least") else value <= about["limit"]
        sentence = about["sentence"].format(value=value, **details, **words)
        passed = "pass" if at_most is None or at_most <= about["limit"] else "too few"
        found = {"model": self.name, "status": passed if holds else "warn", "value": value, "sentence": sentence}
        return Diagnostic(**(about | found), details=details)

    def not_run(self, check: str, why: str) -> Diagnostic:
        found = {"model": self.name, "status": "not run", "value": None, "sentence": why}
        return Diagnostic(**(CHECKS[check] | found))

    def keep(self, rows: Tensor, images: Tensor) -> None:
        """Remember ``images`` (m, ...), which break the examples at ``rows`` (m,) inside the budget."""
        self.broken_by.append((rows.cpu(), images.detach().float().cpu()))

    def counted(self) -> CountedModel:
        return CountedModel(self.model, self.problem.n_classes, self.problem.device(self.x.device))

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
            for part in rows.split(self.problem.batch_that_fits):
                point, y = self.x[part].contiguous().requires_grad_(), self.y[part]
                with torch.enable_grad():
                    value = loss(counted(point), y, y).sum()
                parts.append(torch.autograd.grad(value, point)[0].detach())
        return torch.cat(parts)


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
