"""What sparsifying was worth, in words and by a stated rule."""

from dataclasses import dataclass
from typing import Literal

from .format import interval
from .paired import (
    MIN_FLIPS,
    N_STANDARD_ERRORS,
    Outcomes,
    PairedDifference,
    differences_of,
    paired_difference,
    side_of_zero,
)

VerdictName = Literal["real gain", "unproven gain", "no difference", "gradient masking", "worse"]


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
    4. ``no difference``     anything else, too few examples included.

    Where no BPDA attack was run, the reason says so.
    """
    plain = paired_difference(sparsified_plain, base_plain)
    worst = paired_difference(sparsified_worst, base_worst)
    missing = side_of_zero(differences_of(sparsified_plain, base_plain) - differences_of(sparsified_worst, base_worst))
    name, note = _judged(plain, worst, missing, bpda_was_run)
    if not bpda_was_run and name != "unproven gain":
        note += "; no BPDA attack was run"
    under_plain = f"{plain} points under the plain attacks, " if plain_was_run else ""
    return Verdict(name, f"{under_plain}{worst} points in the worst case: {note}")


def _judged(
    plain: PairedDifference, worst: PairedDifference, missing: int, bpda_was_run: bool
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
    if _is_gain(plain):
        return "no difference", "a gain under the plain attacks alone; more examples would tell"
    if any(_has_too_few_flips(difference) for difference in (plain, worst)):
        return "no difference", f"fewer than {MIN_FLIPS} examples changed sides; more would tell"
    return "no difference", f"the 95 % interval, {interval(*worst.interval_95)}, has 0 inside"


def _is_gain(difference: PairedDifference) -> bool:
    return difference.is_clear and difference.difference > 0


def _has_too_few_flips(d: PairedDifference) -> bool:
    return d.gained + d.lost < MIN_FLIPS and abs(d.difference) > N_STANDARD_ERRORS * d.standard_error
