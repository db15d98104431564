"""What sparsifying was worth, in words and by a stated rule."""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Literal

from .format import in_points, interval
from .paired import (
    MIN_FLIPS,
    Outcomes,
    PairedDifference,
    differences_of,
    interval_of,
    paired_difference,
    side_of_zero,
)

VerdictName = Literal["real gain", "unproven gain", "no difference", "inconclusive", "gradient masking", "worse"]

MARGIN = 0.02
"""Differences below this, a fraction, count as none."""


@dataclass(frozen=True)
class Verdict:
    """What the comparison amounts to, and the numbers behind it in one sentence."""

    name: VerdictName
    reason: str


def verdict(
    *,
    base_plain: Outcomes,
    sparsified_plain: Outcomes,
    base_worst: Outcomes,
    sparsified_worst: Outcomes,
    bpda_was_run: bool = True,
    plain_was_run: bool = True,
    margin: float = MARGIN,
) -> Verdict:
    """The verdict on outcomes (n,) of both models under the plain attacks and in the worst case.

    A paired difference is *clear* when its 95 % interval leaves zero out and at least 6 examples changed sides.
    The first rule that holds decides:

    1. ``real gain``         the worst case, which includes BPDA, has a clear gain.
       ``unproven gain``     the same, but no BPDA attack was run: masking has not been ruled out.
    2. ``gradient masking``  the plain attacks show a clear gain, the worst case does not, and the part of the gain that
                             goes missing between the two is clear itself. It is called masking also when the worst
                             case is clearly below the base model; the reason then says so.
    3. ``worse``             the worst case is clearly below the base model.
    4. ``no difference``     the worst case's 95 % interval lies inside ``margin`` (a fraction) on both sides of zero.
    5. ``inconclusive``      anything else; the reason says how many examples would tell: ``examples_to_tell``.

    Where no BPDA attack was run, the reason says so.
    """
    plain = paired_difference(sparsified_plain, base_plain)
    worst = paired_difference(sparsified_worst, base_worst)
    missing = side_of_zero(differences_of(sparsified_plain, base_plain) - differences_of(sparsified_worst, base_worst))
    name, note = _judged(plain, worst, missing, bpda_was_run, margin)
    if not bpda_was_run and name != "unproven gain":
        note += "; no BPDA attack was run"
    under_plain = f"{plain} points under the plain attacks, " if plain_was_run else ""
    return Verdict(name, f"{under_plain}{worst} points in the worst case: {note}")


def _judged(
    plain: PairedDifference, worst: PairedDifference, missing: int, bpda_was_run: bool, margin: float
) -> tuple[VerdictName, str]:
    """The first rule that holds; ``missing``: the side of zero of the plain gain minus the worst case's."""
    if _is_gain(worst):
        if not bpda_was_run:
            return "unproven gain", "no BPDA attack was run, so that gradient masking is not ruled out"
        if missing > 0:
            return "real gain", "part of the gain under the plain attacks is masking"
        return "real gain", "it holds in the worst case, BPDA included"
    is_masked = _is_gain(plain) and missing > 0
    if worst.is_clear:  # and below zero, or the first rule had held
        return "gradient masking" if is_masked else "worse", "the worst case is below the base model"
    if is_masked and worst.difference > 0:
        return "gradient masking", "what is left in the worst case is not clear of zero"
    if is_masked:
        return "gradient masking", "none of the gain is left in the worst case"
    note = "; a gain under the plain attacks alone" if _is_gain(plain) else ""
    limits = f"{in_points(-margin)} to {in_points(margin)}"
    found = f"the 95 % interval, {interval(*worst.interval_95)},"
    if is_inside(worst.interval_95, margin):
        return "no difference", f"{found} lies inside {limits}{note}"
    few = f"fewer than {MIN_FLIPS} examples changed sides and " if worst.gained + worst.lost < MIN_FLIPS else ""
    n = examples_to_tell(worst, margin)
    return "inconclusive", f"{few}{found} reaches outside {limits}; about {n:,} examples would tell{note}"


def is_inside(interval_95: tuple[float, float], margin: float) -> bool:
    """Whether an interval lies inside ``margin`` on both sides of zero.

    >>> is_inside((-0.01, 0.019), 0.02), is_inside((-0.021, 0.0), 0.02)
    (True, False)
    """
    low, high = interval_95
    return -margin < low and high < margin


def examples_to_tell(found: PairedDifference, margin: float) -> int:
    """How many examples would settle a difference of this size, were each example as likely to change sides as now:
    the fewest, more than there were, whose 95 % interval lies inside the margin, or leaves zero out with 6 changes.
    """

    def would_tell(n: int) -> bool:
        net, flips = ((found.gained + sign * found.lost) * n / found.n for sign in (-1, 1))
        low, high = interval_of(net, flips, n)
        return is_inside((low, high), margin) or (flips >= MIN_FLIPS and not low <= 0 <= high)

    enough = 2 * found.n
    while not would_tell(enough):
        enough *= 2
    return bisect_left(range(enough), True, lo=found.n + 1, key=would_tell)


def _is_gain(difference: PairedDifference) -> bool:
    return difference.is_clear and difference.difference > 0
