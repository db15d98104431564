"""Accuracies with error bars, paired differences between two models, and what they amount to in words.

Everything here takes per-example outcomes, (n,) bool: is this example classified correctly? Two models are compared on the
same examples, so their difference is paired: its standard error comes from the examples on which the two disagree,
and is far smaller than that of two separate samples.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

Outcomes: TypeAlias = "Tensor | NDArray[np.bool_]"
VerdictName = Literal["real gain", "unproven gain", "no difference", "gradient masking", "worse"]

Z_95 = 1.959963984540054
N_STANDARD_ERRORS = 2.0
MIN_FLIPS = 6  # with fewer, no split of them reaches 5 % in an exact two-sided McNemar test (2 * 0.5**5 = 0.0625)


@dataclass(frozen=True)
class Accuracy:
    """``fraction`` in [0, 1] of ``n`` examples, with its binomial ``standard_error``, sqrt(p (1 - p) / n)."""

    fraction: float
    standard_error: float
    n: int


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

    @property
    def interval_95(self) -> tuple[float, float]:
        """The 95 % interval of Agresti and Min (2005): the normal one after half an example is added to each of the four
        cells. It keeps its promise where few examples changed sides, and is not of width 0 where none did.
        """
        low, high = _interval_95(self.gained - self.lost, self.gained + self.lost, self.n)
        return max(low, -1.0), min(high, 1.0)

    @property
    def is_clear(self) -> bool:
        """The 95 % interval leaves zero out, and at least 6 examples changed sides."""
        low, high = self.interval_95
        return self.gained + self.lost >= MIN_FLIPS and not low <= 0 <= high


@dataclass(frozen=True)
class Verdict:
    """What the comparison amounts to, and the numbers behind it in one sentence."""

    name: VerdictName
    reason: str


def accuracy_of(correct: Outcomes) -> Accuracy:
    """Accuracy of outcomes (n,) bool. Raises ``DataError`` for no example at all.

    >>> accuracy_of(np.array([True, True, True, False]))
    Accuracy(fraction=0.75, standard_error=0.21650635094610965, n=4)
    """
    outcomes = as_outcomes(correct)
    fraction = float(outcomes.mean())
    return Accuracy(fraction, math.sqrt(fraction * (1 - fraction) / len(outcomes)), len(outcomes))


def paired_difference(correct: Outcomes, reference: Outcomes) -> PairedDifference:
    """Accuracy of ``correct`` (n,) minus that of ``reference`` (n,), example by example.

    Raises ``DataError`` where the two are not of one length, or empty.
    """
    mine, theirs = as_outcomes(correct), as_outcomes(reference)
    difference, standard_error = _mean_and_error(_differences(mine, theirs))
    return PairedDifference(
        difference, standard_error, int((mine & ~theirs).sum()), int((~mine & theirs).sum()), len(mine)
    )


def side_of_zero(differences: NDArray[Any]) -> int:
    """Is the mean of per-example differences (n,) above zero (1), below it (-1), or is that not clear (0)?

    As ``PairedDifference.is_clear``, for differences of any size, such as those between two gains.
    """
    if np.count_nonzero(differences) < MIN_FLIPS:
        return 0
    low, high = _interval_95(float(differences.sum()), float((differences**2).sum()), len(differences))
    return int(low > 0) - int(high < 0)


def verdict(
    *,
    base_plain: Outcomes,
    sparsified_plain: Outcomes,
    base_worst: Outcomes,
    sparsified_worst: Outcomes,
    bpda_was_run: bool = True,
    plain_was_run: bool = True,
) -> Verdict:
    """What sparsifying was worth, from outcomes (n,) of both models under the plain attacks and in the worst case.

    A paired difference is *clear* when its 95 % interval leaves zero out and at least 6 examples changed sides.
    The first rule that holds decides:

    1. ``real gain``         the worst case, which includes BPDA, has a clear gain.
       ``unproven gain``     the same, but no BPDA attack was run: masking has not been ruled out.
    2. ``gradient masking``  the plain attacks show a clear gain, the worst case does not, and the part of the gain that
                             goes missing between the two is clear itself. It is called masking also when the worst
                             case is clearly below the base model; the reason then says so.
    3. ``worse``             the worst case is clearly below the base model.
    4. ``no difference``     anything else, too few examples included.

    Where no BPDA attack was run, the reason says so.
    """
    plain = paired_difference(sparsified_plain, base_plain)
    worst = paired_difference(sparsified_worst, base_worst)
    missing = side_of_zero(
        _differences(as_outcomes(sparsified_plain), as_outcomes(base_plain))
        - _differences(as_outcomes(sparsified_worst), as_outcomes(base_worst))
    )
    name: VerdictName
    if worst.is_clear and worst.difference > 0:
        name, note = "real gain", "part of the gain under the plain attacks is masking"
        if not bpda_was_run:
            name, note = "unproven gain", "no BPDA attack was run, so that gradient masking is not ruled out"
        elif missing <= 0:
            note = "it holds in the worst case, BPDA included"
    elif plain.is_clear and plain.difference > 0 and missing > 0:
        name = "gradient masking"
        if worst.is_clear:  # and below zero, or the first rule had held
            note = "the worst case is below the base model"
        elif worst.difference > 0:
            note = "what is left in the worst case is not clear of zero"
        else:
            note = "none of the gain is left in the worst case"
    elif worst.is_clear:
        name, note = "worse", "the worst case is below the base model"
    elif plain.is_clear and plain.difference > 0:
        name, note = "no difference", "a gain under the plain attacks alone; more examples would tell"
    elif any(
        d.gained + d.lost < MIN_FLIPS and abs(d.difference) > N_STANDARD_ERRORS * d.standard_error
        for d in (plain, worst)
    ):
        name, note = "no difference", f"fewer than {MIN_FLIPS} examples changed sides; more would tell"
    else:
        low, high = worst.interval_95
        name, note = "no difference", f"the 95 % interval, {100 * low:+.2f} to {100 * high:+.2f}, has 0 inside"
    if not bpda_was_run and name != "unproven gain":
        note += "; no BPDA attack was run"
    under_plain = f"{_points(plain)} under the plain attacks, " if plain_was_run else ""
    return Verdict(name, f"{under_plain}{_points(worst)} in the worst case: {note}")


def as_outcomes(correct: Any) -> NDArray[np.bool_]:
    """A bool tensor on any device, or an array -> (n,) bool array. Raises ``DataError`` for anything else."""
    array = np.asarray(correct.detach().cpu() if hasattr(correct, "detach") else correct)
    if array.ndim != 1 or array.dtype != np.bool_ or not len(array):
        raise DataError(f"got outcomes {array.dtype} of shape {array.shape}, expected bool of shape (n,), n at least 1")
    return array


def _differences(mine: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Per-example differences (n,) in {-1, 0, 1}."""
    if mine.shape != theirs.shape:
        raise DataError(f"outcomes of {len(mine)} and of {len(theirs)} examples cannot be paired")
    return mine.astype(np.int64) - theirs.astype(np.int64)


def _interval_95(total: float, squares: float, n: int) -> tuple[float, float]:
    """Of a mean of n differences that sum to ``total``, their squares to ``squares`` (Agresti and Min 2005)."""
    n += 2
    middle = total / n
    half = Z_95 * math.sqrt(squares + 1 - total**2 / n) / n
    return middle - half, middle + half


def _mean_and_error(differences: NDArray[np.int64]) -> tuple[float, float]:
    return float(differences.mean()), float(differences.std() / math.sqrt(len(differences)))


def _points(difference: PairedDifference) -> str:
    return f"{100 * difference.difference:+.2f} ± {100 * difference.standard_error:.2f} points"
