"""Whether our results bear out what the paper says: confirmed, contradicted or inconclusive, by a stated rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..stats.bounds import side_of_difference, side_of_rate
from ..stats.format import percent
from ..stats.multiple import Z_POWER
from ..stats.paired import MIN_FLIPS, Z_95, side_of_zero
from .tables import Claim, content

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


Lookup = Callable[[tuple[str, str]], tuple[NDArray[np.int64], NDArray[np.bool_]] | None]
"""A cell's (column, row) -> the examples and whether each is classified correctly; None where it was not run."""


def judge(claim: Claim, paper: float, find: Lookup) -> Judgement:
    """Judge a claim on the outcomes that ``find`` knows. ``paper``: the same weighted sum of the paper's cells."""
    found = {place: find(place) for place in claim.terms}
    missing = [f"{column}, {row}" for (column, row), outcomes in found.items() if outcomes is None]
    if missing:
        return Judgement(claim, "not run", paper, why=f"not run: {'; '.join(missing)}")
    examples = [outcomes[0] for outcomes in found.values() if outcomes is not None]
    if not all(np.array_equal(examples[0], other) for other in examples[1:]):
        return Judgement(claim, "inconclusive", paper, why="not measured on the same images")
    each = sum(
        (claim.terms[place] * outcomes[1].astype(float) for place, outcomes in found.items() if outcomes is not None),
        start=np.zeros(len(examples[0])),
    )
    return _judge_sum(claim, paper, each)


def _judge_sum(claim: Claim, paper: float, each: NDArray[np.float64]) -> Judgement:
    n = len(each)
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


def in_words(attack: str, own: Judgement, worst: Judgement | None) -> str:
    """One claim under the paper's measure, which is called ``attack``, and in the worst case."""
    return sentence([(attack, own), *([] if worst is None else [("Worst case, BPDA included", worst)])])


def sentence(judgements: Sequence[tuple[str, Judgement]]) -> str:
    """One claim in words: the paper's number, then ours under each measure."""
    first = judgements[0][1]
    parts = []
    for name, judgement in judgements:
        if judgement.ours is None:
            why = f" ({judgement.why})" if judgement.why and judgement.answer != "not run" else ""
            parts.append(f"{name}: **{judgement.answer}**{why}")
        else:
            left = _what_is_left_open(judgement) if judgement.answer == "inconclusive" else ""
            parts.append(
                f"{name}: **{judgement.answer}**, {with_error(judgement)} on {judgement.n_examples:,} images{left}"
            )
    here = f" On `{first.stand_in}` in its place:" if first.stand_in else ""
    return f"{first.claim.sentence} (paper: {first.claim.number(first.paper)}).{here} {'. '.join(parts)}."


def with_error(judgement: Judgement) -> str:
    """Our number of a claim that was judged, with its standard error in points."""
    assert judgement.ours is not None and judgement.standard_error is not None
    return f"{judgement.claim.number(judgement.ours)} ± {percent(judgement.standard_error)}"


def _what_is_left_open(judgement: Judgement) -> str:
    """Whether it could still be as the paper has it, and how many images would tell."""
    assert judgement.ours is not None and judgement.standard_error is not None
    if abs(judgement.paper - judgement.ours) > Z_95 * judgement.standard_error > 0:
        return " (the paper's number lies outside our 95 % interval)"
    needed = judgement.n_for_the_papers
    return "" if needed is None else f" (the paper's number would take about {needed:,})"
