"""One sanity check: what it is called, where its limit lies, and what came of it."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..engine.outcomes import ModelName

Status = Literal["pass", "warn", "not run"]
Unit = Literal["share", "points", "count", "number"]

CARLINI = "Carlini et al. 2019, arXiv 1902.06705"
AUTOATTACK = "AutoAttack's flags, checks.py and flags_doc.md"
PINTOR = "Pintor et al. 2022, arXiv 2106.09947"
OWN = "meansparse's own"


@dataclass(frozen=True)
class Diagnostic:
    """What one check found on one model.

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
        return asdict(self) | {"value": _rounded(self.value), "details": _rounded(self.details)}


@dataclass(frozen=True)
class Check:
    """What a check is called, where its limit lies and who asks for it; ``at_least``: the limit is a least value."""

    name: str
    limit: float
    unit: Unit
    source: str
    at_least: bool = False

    def judged(self, model: ModelName, value: float, sentence: str, **details: Any) -> Diagnostic:
        """``pass`` or ``warn``, by ``value``; one that is not a number is a warning."""
        holds = value >= self.limit if self.at_least else value <= self.limit
        return self._found(model, "pass" if holds else "warn", sentence, value, details)

    def not_run(self, model: ModelName, sentence: str) -> Diagnostic:
        """There is no value, and the sentence says why."""
        return self._found(model, "not run", sentence)

    def _found(
        self, model: ModelName, status: Status, sentence: str, value: float | None = None, details: Any = None
    ) -> Diagnostic:
        found = {"model": model, "status": status, "value": value, "sentence": sentence, "details": details or {}}
        return Diagnostic(**(asdict(self) | found))


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
