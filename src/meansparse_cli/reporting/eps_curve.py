"""The worst case over eps, from the report of an evaluation at several."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..settings.values import eps_value
from .figure import BLUE, ORANGE, draw_band, draw_grid, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINES = {"base": (BLUE, "o"), "sparsified": (ORANGE, "s")}


def draw_eps_curve(results: dict[str, Any], *, norm: str, title: str, png: Path, svg: Path) -> None:
    """Worst case of both models over eps, the clean accuracy at 0; bands of one standard error around them."""
    grid = [row["eps"] for row in results["eps_curve"]]
    over_255 = all("/255" in eps for eps in grid)
    scale = 255 if over_255 else 1
    budgets = [0.0, *(scale * eps_value(eps) for eps in grid)]
    rows = [results["comparisons"][0], *results["eps_curve"]]  # clean is the first comparison

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for model, (colour, marker) in LINES.items():
            draw_band(
                axes,
                budgets,
                [100 * row[f"{model}_accuracy"] for row in rows],
                [100 * row[f"{model}_standard_error"] for row in rows],
                opacity=0.18,
                color=colour,
                marker=marker,
                markersize=5,
                linewidth=1.8,
                label=model,
            )
        axes.set_xlabel(f"eps, {norm}" + (", in 1/255" if over_255 else ""))
        axes.set_ylabel("accuracy at its worst (%), ± 1 standard error")
        axes.set_ylim(bottom=0)
        draw_grid(axes)
        axes.legend(loc="best", frameon=False)

    save_figure(draw, (7.2, 4.2), png, svg, title=title, rounded=False)
