"""Error bars for one alpha among many: paired differences, corrected for having looked at all of them.

The best of ten looks better than it is. |difference| exceeds the *simultaneous* critical value (in standard errors)
for any alpha at all in 5 % of sweeps in which none differs from the base: the 95 % quantile of the largest |t| (max-t),
from Gaussian multipliers on the examples' differences, so that alphas that do nearly the same count nearly once.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .paired import MIN_FLIPS, Z_95, Outcomes, differences_of, paired_difference

N_DRAWS = 4000
Z_POWER = 0.8416212335729143  # 80 % power


def critical_value(pairs: Sequence[tuple[Outcomes, Outcomes]], *, seed: int = 0) -> float:
    """Standard errors that a paired difference must exceed to be clear although ``len(pairs)`` of them were looked at.

    ``pairs``: (outcomes, base outcomes), (n,) bool each on the same examples; n may differ between pairs, which are
    prefixes of one order. At least 1.96; pairs without a single flip do not count.
    """
    columns = [column for pair in pairs if (column := _centred(*pair)) is not None]
    if not columns:
        return Z_95
    rng, n = np.random.default_rng(seed), max(len(column) for column in columns)
    padded = np.stack([np.pad(column, (0, n - len(column))) for column in columns])
    largest = np.concatenate([np.abs(rng.standard_normal((200, n)) @ padded.T).max(1) for _ in range(N_DRAWS // 200)])
    return max(Z_95, float(np.quantile(largest, 0.95)))


def adjusted_p(mine: Outcomes, base: Outcomes, n_looks: int) -> float:
    """Exact two-sided McNemar test times the number of alphas looked at (Bonferroni), at most 1."""
    difference = paired_difference(mine, base)
    n, k = difference.gained + difference.lost, min(difference.gained, difference.lost)
    p = 1.0 if not n else min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    return min(1.0, p * n_looks)


def is_clear(mine: Outcomes, base: Outcomes, critical: float) -> bool:
    """Beyond ``critical`` standard errors, with at least 6 examples that changed sides."""
    d = paired_difference(mine, base)
    return d.gained + d.lost >= MIN_FLIPS and abs(d.difference) > critical * d.standard_error


def examples_to_tell(mine: Outcomes, other: Outcomes) -> int | None:
    """How many examples would show the difference between two alphas at 5 %, with 80 % power; None if there is none."""
    d = paired_difference(mine, other)
    if d.difference == 0:
        return None
    variance = d.standard_error**2 * d.n
    return math.ceil((Z_95 + Z_POWER) ** 2 * variance / d.difference**2)


def _centred(mine: Outcomes, base: Outcomes) -> NDArray[np.float64] | None:
    """Per-example differences less their mean, scaled to unit length: one standard error is 1."""
    differences = differences_of(mine, base).astype(np.float64)
    differences -= differences.mean()
    length = float(np.sqrt((differences**2).sum()))
    return differences / length if length > 0 else None
