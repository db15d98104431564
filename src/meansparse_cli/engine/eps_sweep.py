"""``meansparse evaluate --eps A:B:STEP``: the same evaluation at several budgets, its table and its curve.

An image that broke an example at one eps is inside every larger budget: from the smallest eps up, nobody is attacked
again by what has already broken it.
"""

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.table import Table

from ..files import atomic_write
from ..reporting.console import percent
from ..settings.values import eps_value
from .evaluation import CLEAN, MODELS, PLAIN, WORST_CASE, Evaluation
from .state import SETTINGS

COLOURS = {"base": "#0072B2", "sparsified": "#D55E00"}  # Okabe and Ito's, as in the curve over alpha


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
    from ..data.datasets import KNOWN_DATASETS

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


def eps_table(evaluations: dict[str, Evaluation]) -> Table:
    """For people: the worst case of both models at every eps."""
    table = Table(title="worst case by eps (± standard error; gains are paired)", title_justify="left")
    table.add_column("eps")
    for column in ("base %", "sparsified %", "gain, points", "verdict"):
        table.add_column(column, justify="right")
    clean = next(iter(evaluations.values())).comparison(CLEAN)
    rows = [("0 (clean)", clean, "")]
    rows += [(eps, found.comparison(WORST_CASE), found.verdict.name) for eps, found in evaluations.items()]
    for name, row, verdict in rows:
        table.add_row(
            name, percent(row.base.fraction, row.base.standard_error),
            percent(row.sparsified.fraction, row.sparsified.standard_error),
            percent(row.gain.difference, row.gain.standard_error, signed=True), verdict,
        )  # fmt: skip
    return table


def draw_eps_curve(evaluations: dict[str, Evaluation], *, norm: str, title: str, png: Path, svg: Path) -> None:
    """Worst case of both models over eps, bands of one standard error around them; equal results give equal bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.size": 11, "svg.hashsalt": "meansparse", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        clean = next(iter(evaluations.values())).comparison(CLEAN)
        over_255 = all("/255" in eps for eps in evaluations)
        scale = 255 if over_255 else 1
        budgets = [0.0, *(scale * eps_value(eps) for eps in evaluations)]
        rows = [clean, *(found.comparison(WORST_CASE) for found in evaluations.values())]
        for model, marker in zip(MODELS, ("o", "s"), strict=True):
            accuracies = [getattr(row, model) for row in rows]
            values = [100 * accuracy.fraction for accuracy in accuracies]
            errors = [100 * accuracy.standard_error for accuracy in accuracies]
            low = [value - error for value, error in zip(values, errors, strict=True)]
            high = [value + error for value, error in zip(values, errors, strict=True)]
            axes.fill_between(budgets, low, high, color=COLOURS[model], alpha=0.18, linewidth=0)
            axes.plot(budgets, values, color=COLOURS[model], marker=marker, markersize=5, linewidth=1.8, label=model)
        axes.set_xlabel(f"eps, {norm}" + (", in 1/255" if over_255 else ""))
        axes.set_ylabel("accuracy at its worst (%), ± 1 standard error")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(loc="best", frameon=False)
        figure.suptitle(title, x=0.02, ha="left", fontsize=11)
        with atomic_write(png) as temporary:
            figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
        with atomic_write(svg) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
