"""Whether our results bear out what the paper says: confirmed, contradicted or inconclusive, by a stated rule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..stats.format import percent
from ..stats.multiple import Z_POWER
from ..stats.paired import MIN_FLIPS, Z_95, side_of_difference, side_of_rate, side_of_zero
from .tables import Claim, Place, content

Answer = Literal["confirmed", "contradicted", "inconclusive", "not run"]
RULE: str = content()["rule"].format(n=MIN_FLIPS)
"""By which a claim is judged, in words."""


@dataclass(frozen=True)
class Judgement:
    """What became of a claim: ``ours`` is our weighted sum with its ``standard_error``, fractions; ``paper``: theirs.

    ``why``: it was not judged. ``stand_in``: our model, where the claim names another one.
    """

    claim: Claim
    answer: Answer
    paper: float
    ours: float | None = None
    standard_error: float | None = None
    n_examples: int | None = None
    why: str = ""
    stand_in: str = ""

    def __str__(self) -> str:
        """Our number with its standard error in points; nothing where the claim was not judged."""
        return "" if self.ours is None else f"{self.claim.number(self.ours)} ± {percent(self.standard_error)}"

    @property
    def leaves_out_the_papers(self) -> bool:
        """Does the paper's number lie outside our 95 % interval?"""
        error = self.standard_error or 0.0
        return self.ours is not None and abs(self.paper - self.ours) > Z_95 * error > 0

    @property
    def n_for_the_papers(self) -> int | None:
        """How many images would show a sum as large as the paper's in 80 % of samples, at 2.5 %, by our spread.

        To two digits; None where these suffice, or where nothing can be said.
        """
        distance = self.paper - self.claim.bound
        if not self.n_examples or not self.standard_error or not distance:
            return None
        needed = self.n_examples * ((Z_95 + Z_POWER) * self.standard_error / distance) ** 2
        return int(float(f"{needed:.2g}")) if needed > self.n_examples else None

    def to_report(self) -> dict[str, Any]:
        """Plain values, of which, with the claim, it can be made again."""
        return {name: value for name, value in vars(self).items() if name != "claim"}


Found = tuple[NDArray[np.int64], NDArray[np.bool_]] | None
"""Of a cell: the examples and whether each is classified correctly, (n,) each; None where it was not run."""
Judged = tuple[Judgement, Judgement | None]
"""A claim under the paper's measure, and in the worst case (None: a claim on clean accuracy)."""


def judge(claim: Claim, paper: float, find: Callable[[Place], Found]) -> Judgement:
    """Judge a claim on what ``find`` knows of its cells. ``paper``: the weighted sum of the paper's own."""
    found = {place: find(place) for place in claim.terms}
    if missing := [", ".join(place) for place, outcomes in found.items() if outcomes is None]:
        return Judgement(claim, "not run", paper, why=f"not run: {'; '.join(missing)}")
    terms = [(claim.terms[place], *outcomes) for place, outcomes in found.items() if outcomes is not None]
    if not all(np.array_equal(terms[0][1], examples) for _, examples, _ in terms):
        return Judgement(claim, "inconclusive", paper, why="not measured on the same images")
    n = len(terms[0][1])
    each = sum((weight * right.astype(float) for weight, _, right in terms), start=np.zeros(n))
    if claim.is_level:
        side = side_of_rate(int(each.sum()), n, claim.bound)
    elif claim.bound:
        side = side_of_difference(int((each > 0).sum()), int((each < 0).sum()), n, claim.bound)
    else:
        side = side_of_zero(each)
    if claim.is_below:
        side = -side
    answer: Answer = "confirmed" if side > 0 else "contradicted" if side < 0 else "inconclusive"
    return Judgement(claim, answer, paper, float(each.mean()), float(each.std() / n**0.5), n)


def claims_data(judgements: Sequence[Judged], *, with_measure: bool = False) -> list[dict[str, Any]]:
    return [
        {"text": own.claim.text}
        | ({"measure": own.claim.measure} if with_measure else {})
        | {"under_its_attack": own.to_report()}
        | ({} if worst is None else {"worst_case": worst.to_report()})
        for own, worst in judgements
    ]
