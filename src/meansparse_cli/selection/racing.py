"""Racing: leave out of the rest of a sweep the alphas that it would not choose any more.

After each block of images every alpha is compared with the leader on the examples that both were scored on. Given the
first k of n examples, the difference d that all n would show is known up to what the other n - k add: it lies within
z * s * sqrt(1/k - 1/n) of d, where s is the standard deviation of the per-example differences. An alpha is dropped when
even the upper end of that interval would leave it less than one standard error (s / sqrt(n), what the sweep's own error
bar would be) ahead of the leader. So the stated error of racing is one paired standard error of the full sweep, and the
chance that any alpha is wrongly dropped in the sweep is at most 1 - confidence: look number j may spend 1 / (j (j + 1))
of it, shared among the rivals (Bonferroni), whatever the number of looks. Alpha = 0 is never dropped.

The clean constraint needs no statistics: clean accuracy is measured on all examples first, one forward pass each, and
an alpha that breaks the constraint cannot be chosen; it is attacked on the first block only, for the curve.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from ..engine.cells import Variant
from ..ledger import Decisions
from ..stats.paired import Outcomes, as_outcomes

CONFIDENCE = 0.95
TOLERANCE = 1.0  # paired standard errors of the full sweep
MIN_EXAMPLES = 50


@dataclass(frozen=True)
class Drop:
    """A variant that left: after ``n_examples``, ``difference`` behind the leader, in the end at most ``bound``."""

    column: Variant  # as files call it
    n_examples: int
    difference: float
    bound: float


def behind(outcomes: Mapping[Variant, Outcomes], base: Variant, *, n_final: int, look: int) -> list[Drop]:
    """The variants to drop at look number ``look`` (from 1); ``outcomes`` (k,) bool each on the same examples."""
    arrays = {variant: as_outcomes(mask) for variant, mask in outcomes.items()}
    k = len(next(iter(arrays.values())))
    if len(arrays) < 2 or k < MIN_EXAMPLES or k >= n_final:
        return []
    leader = max(arrays, key=lambda variant: (int(arrays[variant].sum()), variant == base))
    level = (1 - CONFIDENCE) / (look * (look + 1)) / (len(arrays) - 1)
    z = NormalDist().inv_cdf(1 - level)
    drops = []
    for variant, mine in arrays.items():
        if variant in (leader, base):
            continue
        differences = mine.astype(float) - arrays[leader].astype(float)
        difference = float(differences.mean())
        # one flip more than was seen, so that a pair without flips has no error of zero
        deviation = math.sqrt(float(differences.var()) + 1 / k)
        bound = difference + z * deviation * math.sqrt(1 / k - 1 / n_final)
        if bound < TOLERANCE * deviation / math.sqrt(n_final):
            drops.append(Drop(variant, k, difference, bound))
    return drops


class Race:
    """The variants still running for one measure.

    ``history`` holds the drops of each look of an earlier session, which are not decided again: what was scored since
    may have added images to the pools, and a race must not depend on where it was interrupted.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        base: Variant,
        n_final: int,
        measure: Callable[[Variant], Outcomes],
        history: list[list[Drop]] | None = None,
    ) -> None:
        self.running, self.base, self.n_final, self.measure = list(variants), base, n_final, measure
        self.history: list[list[Drop]] = history if history is not None else []
        self.looks = 0

    @property
    def drops(self) -> list[Drop]:
        return [drop for look in self.history[: self.looks] for drop in look]

    def look(self, n_seen: int) -> list[Drop]:
        """Compare what the first ``n_seen`` examples say and let go of those that are behind."""
        self.looks += 1
        if len(self.history) < self.looks:
            outcomes = {variant: self.measure(variant)[:n_seen] for variant in self.running}
            self.history.append(behind(outcomes, self.base, n_final=self.n_final, look=self.looks))
        fresh = self.history[self.looks - 1]
        gone = {drop.column for drop in fresh}
        self.running = [variant for variant in self.running if variant not in gone]
        return fresh


def history_in(decisions: Decisions, curve: str) -> list[list[Drop]]:
    """The drops of each look at one curve, as ``keep_history`` wrote them; none where it never did."""
    looks: list[list[dict[str, Any]]] = decisions.entries.get(curve, [])
    return [[Drop(**drop | {"column": tuple(drop["column"])}) for drop in look] for look in looks]


def keep_history(decisions: Decisions, races: Mapping[str, Race]) -> None:
    decisions.keep({curve: [[vars(drop) for drop in look] for look in race.history] for curve, race in races.items()})
