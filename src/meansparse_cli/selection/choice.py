"""The rule that chooses alpha, as an object to read, and what it chose.

The paper chooses the alpha of best APGD-CE accuracy; that is the rule for the plain curve here, with a constraint on
clean accuracy. Under BPDA or in the worst case the question is another one, whether there is any gain at all, so there
the rule asks for a gain that is clear after looking at every alpha, and answers "alpha = 0: no gain found" otherwise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..errors import ConfigError
from ..stats.format import in_points
from ..stats.multiple import adjusted_p, critical_value, examples_to_tell, is_clear
from ..stats.paired import accuracy_of, paired_difference

Curve = Literal["plain", "bpda", "worst", "apgd-ce"]
CURVES: tuple[Curve, ...] = ("plain", "bpda", "worst")
OBJECTIVES: dict[str, Curve] = {"apgd-ce": "apgd-ce", "apgd": "plain", "bpda": "bpda", "worst": "worst"}
"""Value of ``--objective`` -> the curve that it means."""


@dataclass(frozen=True)
class SweepPoint:
    """One alpha: which held-out examples it classifies correctly. Masks are bool.

    ``clean`` (n,); ``plain``, ``bpda`` and ``worst`` (k,), k <= n: shorter where racing dropped the alpha. ``apgd_ce``
    (k,): APGD-CE alone, the paper's measure; None where ``plain`` is that.
    """

    alpha: float
    clean: Tensor
    plain: Tensor
    bpda: Tensor
    worst: Tensor
    apgd_ce: Tensor | None = None

    def measure(self, curve: Curve) -> Tensor:
        """The outcomes of one curve, (k,) bool."""
        own = self.plain if self.apgd_ce is None else self.apgd_ce
        return {"plain": self.plain, "bpda": self.bpda, "worst": self.worst, "apgd-ce": own}[curve]

    def is_whole(self, curve: Curve) -> bool:
        return len(self.measure(curve)) == len(self.clean)

    def to_report(self, base: "SweepPoint") -> dict[str, Any]:
        """Fractions, with the paired difference from alpha = 0 on the examples this alpha was scored on."""
        row: dict[str, Any] = {"alpha": self.alpha}
        for name in ("clean", *CURVES):
            mine, theirs = getattr(self, name), getattr(base, name)
            row[name] = {"n_examples": len(mine)}
            if len(mine) and len(theirs) >= len(mine):
                accuracy, gain = accuracy_of(mine), paired_difference(mine, theirs[: len(mine)])
                row[name] |= {"accuracy": accuracy.fraction, "standard_error": accuracy.standard_error}
                row[name] |= {"minus_base": gain.difference, "minus_base_standard_error": gain.standard_error}
        return row


@dataclass(frozen=True)
class ChoiceRule:
    """``objective``: as in ``OBJECTIVES``. ``max_clean_drop``: a fraction. Ties go to the smaller alpha.

    ``min_gain``: in paired standard errors, what the best alpha must gain over alpha = 0 on the objective; with less
    the answer is alpha = 0. None: 0 on the plain curve, as the method says; under BPDA and in the worst case the
    simultaneous 95 % critical value of this sweep (about 2.5; see ``stats.multiple``), and at least 6 changed examples.
    """

    objective: str
    max_clean_drop: float
    min_gain: float | None = None
    attacks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"no objective {self.objective!r}", hint=f"one of {', '.join(OBJECTIVES)}")

    @property
    def curve(self) -> Curve:
        return OBJECTIVES[self.objective]

    @property
    def needs_clear_gain(self) -> bool:
        """True where the gain must be clear after looking at every alpha."""
        return self.min_gain is None and self.curve in ("bpda", "worst")

    def is_enough(self, mine: Tensor, base: Tensor, critical: float) -> bool:
        """True where outcomes ``mine`` (n,) gain what the rule asks over ``base`` (n,), at a critical value."""
        gain = paired_difference(mine, base)
        if gain.difference <= 0:
            return False
        if self.needs_clear_gain:
            return is_clear(mine, base, critical)
        return gain.difference >= (self.min_gain or 0.0) * gain.standard_error

    def in_words(self) -> str:
        what = {
            "plain": f"under {', '.join(self.attacks) or self.objective}",
            "bpda": "under BPDA",
            "apgd-ce": "under apgd-ce",
            "worst": "in the worst case over all attacks and transferred images",
        }[self.curve]
        if self.needs_clear_gain:
            gain = "a gain over alpha = 0 beyond the simultaneous 95 % critical value, else alpha = 0"
        elif self.min_gain:
            gain = f"a gain over alpha = 0 of at least {self.min_gain:g} paired standard errors, else alpha = 0"
        else:
            gain = "no minimum gain"
        return (
            f"highest accuracy {what} on the held-out split, among the alphas whose clean accuracy falls by at most "
            f"{100 * self.max_clean_drop:g} points from alpha = 0; ties to the smaller alpha; {gain}"
        )


@dataclass(frozen=True)
class Choice:
    """The choice of a rule, and the numbers behind it. Differences are paired and fractions.

    ``best``: the alpha of highest accuracy that was allowed, which is ``alpha`` unless its gain was too small.
    ``examples_to_tell``: how many examples would tell ``best`` from ``runner_up`` (None: level, or alone).
    """

    rule: ChoiceRule
    alpha: float
    reason: str
    best: float
    gain: float
    gain_standard_error: float
    critical_value: float
    is_clear: bool
    adjusted_p: float
    runner_up: float | None
    examples_to_tell: int | None

    def to_report(self) -> dict[str, Any]:
        about_rule = {
            "alpha": self.alpha,
            "objective": self.rule.objective,
            "curve": self.rule.curve,
            "rule": self.rule.in_words(),
            "max_clean_drop": self.rule.max_clean_drop,
            "min_gain": self.rule.min_gain,
        }
        return about_rule | {name: value for name, value in vars(self).items() if name != "rule"}


def allowed(points: Sequence[SweepPoint], max_clean_drop: float) -> list[SweepPoint]:
    """The points that keep the clean constraint; ``points[0]`` is alpha = 0."""
    lowest = float(points[0].clean.double().mean()) - max_clean_drop - 1e-12
    return [point for point in points if float(point.clean.double().mean()) >= lowest]


def choose(points: Sequence[SweepPoint], rule: ChoiceRule) -> Choice:
    """Apply ``rule``. ``points[0]`` is alpha = 0; points that racing dropped (not scored on everything) do not run."""
    base, curve, rivals = points[0], rule.curve, allowed(points, rule.max_clean_drop)
    running = [point for point in rivals if point.is_whole(curve)]
    best = min(running, key=lambda point: (-int(point.measure(curve).sum()), point.alpha))
    critical = simultaneous_value(points, curve)
    mine, theirs = best.measure(curve), base.measure(curve)
    gain = paired_difference(mine, theirs)
    clear = best.alpha != 0 and gain.difference > 0 and is_clear(mine, theirs, critical)
    enough = best.alpha != 0 and rule.is_enough(mine, theirs, critical)
    rival = _nearest_rival(best, rivals, curve)
    if best.alpha == 0:
        reason = f"alpha = 0: no gain found; no other alpha is above the base on {curve}"
    elif enough:
        found = _numbers(best, base, curve)
        reason = f"alpha = {best.alpha:g}: {found}{'' if clear else ' (not clear after looking at every alpha)'}"
    else:
        needed = f"{critical:.2f} standard errors" if rule.needs_clear_gain else f"{rule.min_gain:g} standard errors"
        found = f"the best, alpha = {best.alpha:g}, has {_numbers(best, base, curve)}"
        reason = f"alpha = 0: no gain found; {found}: {needed} were asked for"
    return Choice(
        rule=rule,
        alpha=best.alpha if enough else 0.0,
        reason=reason + _aside(len(points) - len(rivals), len(rivals) - len(running)),
        best=best.alpha,
        gain=gain.difference,
        gain_standard_error=gain.standard_error,
        critical_value=critical,
        is_clear=clear,
        adjusted_p=adjusted_p(mine, theirs, max(1, len(points) - 1)),
        runner_up=rival.alpha if rival else None,
        examples_to_tell=examples_to_tell(mine[: len(m := rival.measure(curve))], m) if rival else None,
    )


def _numbers(best: SweepPoint, base: SweepPoint, curve: Curve) -> str:
    gain = paired_difference(best.measure(curve), base.measure(curve))
    cost = in_points(paired_difference(best.clean, base.clean).difference)
    return f"{in_points(gain.difference, gain.standard_error)} points against alpha = 0 on {curve}, clean {cost}"


def _aside(n_too_costly: int, n_dropped: int) -> str:
    """Which alphas could not be chosen, and why, in words."""
    counts = ((n_too_costly, "cost too much clean accuracy"), (n_dropped, "dropped by racing"))
    return "".join(f"; {n} alpha{'s'[: n != 1]} {what}" for n, what in counts if n)


def _nearest_rival(best: SweepPoint, points: Sequence[SweepPoint], curve: Curve) -> SweepPoint | None:
    """The point least behind ``best`` on the examples that both were scored on, those that racing dropped included."""
    mine = best.measure(curve)
    rivals = [p for p in points if p is not best and 0 < len(p.measure(curve)) <= len(mine)]
    return min(
        rivals,
        key=lambda p: paired_difference(mine[: len(m := p.measure(curve))], m).difference,
        default=None,
    )


def simultaneous_value(points: Sequence[SweepPoint], curve: Curve) -> float:
    """Standard errors that a difference from alpha = 0 must exceed, all alphas of the curve considered."""
    base = points[0].measure(curve)
    pairs = [(m, base[: len(m)]) for p in points[1:] if len(m := p.measure(curve)) and len(base) >= len(m)]
    return critical_value(pairs)
