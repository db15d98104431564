"""``meansparse evaluate --eps A:B:STEP``: the same evaluation at several budgets.

An image that broke an example at one eps is inside every larger budget: from the smallest eps up, nobody is attacked
again by what has already broken it.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..data.facts import KNOWN_DATASETS
from ..ledger import is_begun_with
from ..settings.values import eps_value
from .cells import FoundImages
from .comparison import Evaluation
from .evaluate import EvaluationRun
from .outcomes import MODELS, PLAIN, WORST_CASE


def evaluate_each_eps(
    begin: Callable[[str, EvaluationRun | None], EvaluationRun],
    grid: Sequence[str],
    pool: Mapping[str, FoundImages] | None = None,
) -> dict[str, EvaluationRun]:
    """``begin(eps, the run before)`` for every eps of ``grid``, ascending; its attacks, then images from elsewhere."""
    runs: dict[str, EvaluationRun] = {}
    smaller: EvaluationRun | None = None
    for eps in grid:
        smaller = runs[eps] = begin(eps, smaller)
        smaller.attack()
        smaller.try_pool(pool or {})
    return runs


def headline_eps(grid: Sequence[str], dataset: str, norm: str) -> str:
    """The eps whose evaluation the report opens with: the data set's own where it is in the grid, else the largest."""
    facts = KNOWN_DATASETS.get(dataset)
    own = facts.eps.get(norm) if facts is not None else None
    same = [eps for eps in grid if own is not None and Fraction(eps) == Fraction(own)]
    return same[0] if same else grid[-1]


def eps_state_folder(folder: Path, eps: str, grid: Sequence[str]) -> Path:
    """Where the evaluation at ``eps`` keeps its state: a folder for each eps of a grid, ``folder`` for a single one.

    What either has begun, the other goes on with.
    """
    own = folder / f"eps-{eps.replace('/', '_')}"
    if own.exists():
        return own
    return folder if is_begun_with(folder, "eps", eps_value(eps)) or len(grid) == 1 else own


def eps_rows(evaluations: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
    """For the report: one row an eps, fractions."""
    rows = []
    for eps, evaluation in evaluations.items():
        worst = evaluation.comparison(WORST_CASE).to_report()
        row = {"eps": eps} | {key: value for key, value in worst.items() if key != "attacks"}
        for plain in (found for found in evaluation.comparisons if found.name == PLAIN):
            row |= {f"{model}_{PLAIN.replace(' ', '_')}_accuracy": getattr(plain, model).fraction for model in MODELS}
        rows.append(row | {"verdict": evaluation.verdict.name})
    return rows
