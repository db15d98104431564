"""``meansparse evaluate --eps A:B:STEP``: the same evaluation at several budgets.

An image that broke an example at one eps is inside every larger budget: from the smallest eps up, nobody is attacked
again by what has already broken it.
"""

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..settings.values import eps_value
from .evaluation import MODELS, PLAIN, WORST_CASE, Evaluation
from .state import SETTINGS


def evaluate_each_eps(
    evaluate_one: Callable[[str, Evaluation | None], Evaluation], grid: Sequence[str]
) -> dict[str, Evaluation]:
    """``evaluate_one(eps, the evaluation at the eps before)`` for every eps of ``grid``, ascending."""
    evaluations: dict[str, Evaluation] = {}
    smaller: Evaluation | None = None
    for eps in grid:
        smaller = evaluations[eps] = evaluate_one(eps, smaller)
    return evaluations


def headline_eps(grid: Sequence[str], dataset: str, norm: str) -> str:
    """The eps whose evaluation the report opens with: the data set's own where it is in the grid, else the largest."""
    from ..data.facts import KNOWN_DATASETS

    facts = KNOWN_DATASETS.get(dataset)
    own = facts.eps.get(norm) if facts is not None else None
    same = [eps for eps in grid if own is not None and Fraction(eps) == Fraction(own)]
    return same[0] if same else grid[-1]


def eps_state_folder(folder: Path, eps: str, grid: Sequence[str]) -> Path:
    """Where the evaluation at ``eps`` keeps its state: a folder for each eps of a grid, ``folder`` itself for a single one.

    What either has begun, the other goes on with.
    """
    own = folder / f"eps-{eps.replace('/', '_')}"
    if own.exists():
        return own
    setting = f'"eps": {json.dumps(eps_value(eps))},'
    is_begun = any(setting in file.read_text() for file in folder.glob(f"*{SETTINGS}"))
    return folder if is_begun or len(grid) == 1 else own


def eps_rows(evaluations: dict[str, Evaluation]) -> list[dict[str, Any]]:
    """For the report: one row an eps, fractions."""
    return [
        {"eps": eps} | {key: value for key, value in row.comparison(WORST_CASE).to_report().items() if key != "attacks"}
        | {f"{model}_{PLAIN.replace(' ', '_')}_accuracy": getattr(plain, model).fraction
           for plain in row.comparisons if plain.name == PLAIN for model in MODELS}
        | {"verdict": row.verdict.name}
        for eps, row in evaluations.items()
    ]  # fmt: skip
