"""Whether our results bear out what the paper says of a table: confirmed, contradicted or inconclusive, by a stated rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .accuracy import MIN_FLIPS, N_STANDARD_ERRORS
from .paper_tables import Claim

Answer = Literal["confirmed", "contradicted", "inconclusive", "not run"]
RULE = (
    f"confirmed: beyond {N_STANDARD_ERRORS:g} standard errors on the claimed side of its bound; contradicted: beyond them on the "
    f"other side; inconclusive: anything else. A difference from zero needs {MIN_FLIPS} examples behind it, and against any other "
    "bound an error is at least one example. Sums and standard errors are paired, example by example"
)


@dataclass(frozen=True)
class Judgement:
    """What became of a claim: ``value`` is our weighted sum with its ``standard_error``, fractions; ``paper`` is the paper's."""

    claim: Claim
    answer: Answer
    paper: float
    value: float | None = None
    standard_error: float | None = None
    n: int | None = None
    why: str = ""

    def to_report(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "answer": self.answer, "paper": self.paper, "ours": self.value, "standard_error": self.standard_error,
            "n_examples": self.n, "why": self.why,
        }  # fmt: skip


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
    n, value = len(each), float(each.mean())
    error = float(each.std() / math.sqrt(n))
    is_level = sum(claim.terms.values()) != 0  # an accuracy, not a difference: at 0 % its error is not 0
    margin = N_STANDARD_ERRORS * max(error, 1 / n if is_level or claim.bound else 0.0)
    above, below = value - margin > claim.bound, value + margin < claim.bound
    if claim.bound == 0 and not is_level and np.count_nonzero(each) < MIN_FLIPS:
        above = below = False
    if claim.is_below:
        above, below = below, above
    answer: Answer = "confirmed" if above else "contradicted" if below else "inconclusive"
    return Judgement(claim, answer, paper, value, error, n)


def sentence(judgements: Sequence[tuple[str, Judgement]]) -> str:
    """One claim in words: the paper's number, then ours under each measure."""
    first = judgements[0][1]
    parts = []
    for name, judgement in judgements:
        if judgement.value is None or judgement.standard_error is None:
            why = f" ({judgement.why})" if judgement.why and judgement.answer != "not run" else ""
            parts.append(f"{name}: **{judgement.answer}**{why}")
            continue
        number = f"{number_of(judgement.value, first.claim)} ± {100 * judgement.standard_error:.2f}"
        parts.append(f"{name}: **{judgement.answer}**, {number} on {judgement.n:,} images")
    text = first.claim.text[0].upper() + first.claim.text[1:]
    return f"{text} (paper: {number_of(first.paper, first.claim)}). {'. '.join(parts)}."


def number_of(value: float, claim: Claim) -> str:
    """A sum of accuracies as a claim means it: an accuracy in %, or a difference in points."""
    is_level = sum(claim.terms.values()) != 0
    return f"{100 * value:.2f} %" if is_level else f"{100 * value:+.2f} points"
