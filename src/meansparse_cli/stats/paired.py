"""Accuracies with error bars, paired differences between two models, and on which side of a bound either lies.

Everything here takes per-example outcomes, (n,) bool: is this example classified correctly? Two models are compared
on the same examples, so that the standard error comes from those on which they disagree alone. A side is 1 above the
bound, -1 below it, 0 not settled: where the truth lies at the bound itself, about 1 sample in 40 is put on either side,
up to 1 in 20 of a few hundred pairs.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .format import in_points, percent

if TYPE_CHECKING:
    from torch import Tensor

Outcomes: TypeAlias = "Tensor | NDArray[np.bool_]"

Z_95 = 1.959963984540054
N_STANDARD_ERRORS = 2.0
LEVEL = 0.025  # of a test against one side of a bound
MIN_FLIPS = 6  # with fewer, no split of them reaches 5 % in an exact two-sided McNemar test (2 * 0.5**5 = 0.0625)


@dataclass(frozen=True)
class Accuracy:
    """``fraction`` in [0, 1] of ``n`` examples, with its binomial ``standard_error``, sqrt(p (1 - p) / n).

    At 0 and 1, where that is nothing, half of Wilson's interval (1927) at one standard error: 1 / (2 (n + 1)).
    """

    fraction: float
    standard_error: float
    n: int

    def __str__(self) -> str:
        return percent(self.fraction, self.standard_error)


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of one model minus that of another on the same ``n`` examples, as a fraction in [-1, 1].

    ``gained``: examples right with the first model and wrong with the second; ``lost``: the other way round.
    ``standard_error`` is the standard deviation (population) of the per-example differences over sqrt(n).
    """

    difference: float
    standard_error: float
    gained: int
    lost: int
    n: int

    def __str__(self) -> str:
        return in_points(self.difference, self.standard_error)

    @property
    def interval_95(self) -> tuple[float, float]:
        """The 95 % interval of Agresti and Min (2005): the normal one after half an example is added to each of the
        four cells. It keeps its promise where few examples changed sides, and is not of width 0 where none did.
        """
        low, high = interval_of(self.gained - self.lost, self.gained + self.lost, self.n)
        return max(low, -1.0), min(high, 1.0)

    @property
    def is_clear(self) -> bool:
        """The 95 % interval leaves zero out, and at least 6 examples changed sides."""
        low, high = self.interval_95
        return self.gained + self.lost >= MIN_FLIPS and not low <= 0 <= high


def accuracy_of(correct: Outcomes) -> Accuracy:
    """Accuracy of outcomes (n,) bool. Raises ``DataError`` for no example at all.

    >>> accuracy_of(np.array([True, True, True, False]))
    Accuracy(fraction=0.75, standard_error=0.21650635094610965, n=4)
    """
    outcomes = as_outcomes(correct)
    fraction = float(outcomes.mean())
    n, variance = len(outcomes), fraction * (1 - fraction)
    return Accuracy(fraction, math.sqrt(variance / n) if variance else 1 / (2 * (n + 1)), n)


def paired_difference(correct: Outcomes, reference: Outcomes) -> PairedDifference:
    """Accuracy of ``correct`` (n,) minus that of ``reference`` (n,); ``DataError`` where they are not of one length."""
    differences = differences_of(correct, reference)
    n, standard_error = len(differences), float(differences.std() / math.sqrt(len(differences)))
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    return PairedDifference(float(differences.mean()), standard_error, gained, lost, n)


def side_of_zero(differences: NDArray[Any]) -> int:
    """On which side of zero is the mean of differences (n,) of any size, as in ``PairedDifference.is_clear``?"""
    if np.count_nonzero(differences) < MIN_FLIPS:
        return 0
    low, high = interval_of(float(differences.sum()), float((differences**2).sum()), len(differences))
    return int(low > 0) - int(high < 0)


def side_of_rate(n_right: int, n: int, bound: float) -> int:
    """``n_right`` of ``n`` examples against ``bound`` in (0, 1); exact binomial (Clopper and Pearson 1934).

    >>> side_of_rate(0, 300, 0.01), side_of_rate(0, 400, 0.01)
    (0, -1)
    """
    from scipy.stats import binom

    if binom.cdf(n_right, n, bound) < LEVEL:
        return -1
    return 1 if binom.sf(n_right - 1, n, bound) < LEVEL else 0


def side_of_difference(gained: int, lost: int, n: int, bound: float) -> int:
    """(``gained`` - ``lost``) / ``n`` of n pairs against ``bound`` in (-1, 1), not 0; score test (Tango 1998).

    The standard error is what it would be if the truth were the bound: where nothing changed sides it is not 0.

    >>> side_of_difference(0, 0, 400, -0.005), side_of_difference(0, 0, 1000, -0.005)
    (0, 1)
    """
    b = -(gained + lost) + (2 * n - gained + lost) * bound
    c = -lost * bound * (1 - bound)
    lost_share = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)  # most likely share of losses, given the bound
    variance = n * (2 * lost_share + bound * (1 - bound))
    z = (gained - lost - n * bound) / math.sqrt(max(variance, 1e-300))
    return int(z > Z_95) - int(z < -Z_95)


def as_outcomes(correct: Any) -> NDArray[np.bool_]:
    """A bool tensor on any device, or an array -> (n,) bool array. Raises ``DataError`` for anything else."""
    array = np.asarray(correct.detach().cpu() if hasattr(correct, "detach") else correct)
    if array.ndim != 1 or array.dtype != np.bool_ or not len(array):
        raise DataError(f"got outcomes {array.dtype} of shape {array.shape}, expected bool of shape (n,), n at least 1")
    return array


def differences_of(correct: Outcomes, reference: Outcomes) -> NDArray[np.int64]:
    """Per-example differences (n,) in {-1, 0, 1}. Raises ``DataError`` for outcomes that cannot be paired."""
    mine, theirs = as_outcomes(correct), as_outcomes(reference)
    if mine.shape != theirs.shape:
        raise DataError(f"outcomes of {len(mine)} and of {len(theirs)} examples cannot be paired")
    return mine.astype(np.int64) - theirs.astype(np.int64)


def interval_of(total: float, squares: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Of a mean of n differences that sum to ``total``, their squares to ``squares`` (Agresti and Min 2005)."""
    n += 2
    middle = total / n
    half = z * math.sqrt(squares + 1 - total**2 / n) / n
    return middle - half, middle + half
