"""Racing: leave out of the rest of a sweep the alphas that it would not choose any more.

After each block of images every alpha is compared with the leader on the examples that both were scored on. Given the first
k of n examples, the difference d that all n would show is known up to what the other n - k add: it lies within
z * s * sqrt(1/k - 1/n) of d, where s is the standard deviation of the per-example differences. An alpha is dropped when
even the upper end of that interval would leave it less than one standard error (s / sqrt(n), what the sweep's own error bar
would be) ahead of the leader. So the stated error of racing is one paired standard error of the full sweep, and the chance
that any alpha is wrongly dropped in the sweep is at most 1 - confidence: look number j may spend 1 / (j (j + 1)) of it, shared
among the rivals (Bonferroni), whatever the number of looks. Alpha = 0 is never dropped.

The clean constraint needs no statistics: clean accuracy is measured on all examples first, one forward pass each, and an
alpha that breaks the constraint cannot be chosen; it is attacked on the first block only, for the curve.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

from ..engine.pairs import Column
from ..errors import ArtifactError
from ..files import write_bytes
from ..stats.paired import Outcomes, as_outcomes

CONFIDENCE = 0.95
TOLERANCE = 1.0  # paired standard errors of the full sweep
MIN_EXAMPLES = 50


@dataclass(frozen=True)
class Drop:
    """An alpha that left: after ``n_examples``, ``difference`` behind the leader, final difference at most ``bound``."""

    column: Column
    n_examples: int
    difference: float
    bound: float


def behind(
    outcomes: dict[Column, Outcomes], base: Column, *, n_final: int, look: int, confidence: float = CONFIDENCE,
    tolerance: float = TOLERANCE,
) -> list[Drop]:  # fmt: skip
    """Which columns to drop at look number ``look`` (from 1); ``outcomes`` (k,) bool each on the same examples."""
    arrays = {column: as_outcomes(mask) for column, mask in outcomes.items()}
    k = len(next(iter(arrays.values())))
    if len(arrays) < 2 or k < MIN_EXAMPLES or k >= n_final:
        return []
    leader = max(arrays, key=lambda column: (int(arrays[column].sum()), column == base))
    level = (1 - confidence) / (look * (look + 1)) / (len(arrays) - 1)
    z = NormalDist().inv_cdf(1 - level)
    drops = []
    for column, mine in arrays.items():
        if column in (leader, base):
            continue
        differences = mine.astype(float) - arrays[leader].astype(float)
        difference = float(differences.mean())
        # one flip more than was seen, so that a pair without flips has no error of zero
        deviation = math.sqrt(float(differences.var()) + 1 / k)
        bound = difference + z * deviation * math.sqrt(1 / k - 1 / n_final)
        if bound < tolerance * deviation / math.sqrt(n_final):
            drops.append(Drop(column, k, difference, bound))
    return drops


class Race:
    """Which columns are still running for one measure.

    ``history`` holds the drops of each look of an earlier session, which are not decided again: pairs that were scored
    since may have added images to the pools, and a race must not depend on where it was interrupted.
    """

    def __init__(
        self, columns: Sequence[Column], base: Column, n_final: int, measure: Callable[[Column], Outcomes],
        history: list[list[Drop]] | None = None,
    ) -> None:  # fmt: skip
        self.running, self.base, self.n_final, self.measure = list(columns), base, n_final, measure
        self.history: list[list[Drop]] = history if history is not None else []
        self.looks = 0

    @property
    def drops(self) -> list[Drop]:
        """Every drop so far."""
        return [drop for look in self.history[: self.looks] for drop in look]

    def look(self, n_seen: int) -> list[Drop]:
        """Compare what the first ``n_seen`` examples say and let go of those that are behind."""
        self.looks += 1
        if len(self.history) < self.looks:
            outcomes = {column: self.measure(column)[:n_seen] for column in self.running}
            self.history.append(behind(outcomes, self.base, n_final=self.n_final, look=self.looks))
        fresh = self.history[self.looks - 1]
        gone = {drop.column for drop in fresh}
        self.running = [column for column in self.running if column not in gone]
        return fresh


def load_history(file: Path) -> dict[str, list[list[Drop]]]:
    """Curve -> looks -> drops, as ``save_history`` wrote them; empty where there is no file."""
    if not file.exists():
        return {}
    try:
        return {
            curve: [[Drop(tuple(drop["column"]), drop["n_examples"], drop["difference"], drop["bound"]) for drop in look] for look in looks]
            for curve, looks in json.loads(file.read_text()).items()
        }  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}", hint=f"delete it and run again: {file}") from error


def save_history(file: Path, races: Mapping[str, Race]) -> None:
    """Put the looks of every race on disk, atomically."""
    content = {curve: [[vars(drop) for drop in look] for look in race.history] for curve, race in races.items()}
    write_bytes(file, json.dumps(content).encode())
