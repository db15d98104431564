"""Curves from reports, as PNG and SVG: a sweep over alpha, an evaluation over eps, a training run over its epochs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..settings.values import eps_value
from .figure import BLACK, BLUE, GREEN, ORANGE, draw_band, draw_grid, draw_legend, save_figure
from .sweep_tables import CURVES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..training.state import EpochResult

Row = dict[str, Any]

STYLES = {"clean": (BLUE, "o"), "plain": (ORANGE, "s"), "bpda": (GREEN, "^"), "worst": (BLACK, "D")}
OF_MODELS = {"base": (BLUE, "o"), "sparsified": (ORANGE, "s")}


def draw_alpha_curve(results: Row, *, title: str, png: Path, svg: Path) -> None:
    """Draw the ``results`` of a ``sweep-alpha`` report: accuracies over alpha with error bands and the chosen alpha.

    Three panels, for the three differ by tens of points and change by a few: clean accuracy; robust accuracy under the
    plain attacks, under BPDA and in the worst case; and the paired difference from alpha = 0, whose band is the one to
    judge by. Raises ``DataError`` for no alpha.
    """
    rows = sorted(results["curve"], key=lambda row: row["alpha"])
    if not rows:
        raise DataError("a curve needs at least one alpha")

    def draw(figure: "Figure") -> None:
        clean_axes, robust_axes, gain_axes = figure.subplots(3, 1, sharex=True, height_ratios=[2, 3, 3])
        for name, label in CURVES.items():
            axes = clean_axes if name == "clean" else robust_axes
            _draw_over_alpha(axes, rows, name, "accuracy", 1.0, f"{label} (± 1 standard error)")
        for name in ("plain", "worst"):
            z = results["critical_values"][name]
            label = f"{CURVES[name]} (95 % for all alphas together: ± {z:.2f} standard errors)"
            _draw_over_alpha(gain_axes, rows, name, "minus_base", z, label)
        gain_axes.axhline(0, color="0.5", linewidth=0.9, linestyle=":")
        clean_axes.set_ylabel("clean accuracy (%)")
        robust_axes.set_ylabel("robust accuracy (%)")
        gain_axes.set_ylabel("minus alpha = 0 (points)")
        gain_axes.set_xlabel("alpha (standard deviations; 0 = base model)")
        _mark(figure.axes, results["choices"])
        for axes in figure.axes:
            draw_grid(axes)
            draw_legend(axes, fontsize=8)

    save_figure(draw, (7.2, 9.0), png, svg, title=title)


def _draw_over_alpha(axes: "Axes", rows: Sequence[Row], name: str, value: str, z: float, label: str) -> None:
    """Percentages with a band of ``z`` standard errors; hollow: an alpha that racing dropped, on fewer examples."""
    scored = [(row["alpha"], row[name]) for row in rows if value in row[name]]
    n_all = max((row["n_examples"] for _, row in scored), default=0)
    whole = [(alpha, row) for alpha, row in scored if row["n_examples"] == n_all]
    dropped = [(alpha, row) for alpha, row in scored if row["n_examples"] < n_all]
    colour, marker = STYLES[name]
    error = "standard_error" if value == "accuracy" else f"{value}_standard_error"
    values, errors = [100 * row[value] for _, row in whole], [100 * z * row[error] for _, row in whole]
    line: Row = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.6, "label": label}
    draw_band(axes, [alpha for alpha, _ in whole], values, errors, opacity=0.13, **line)
    hollow: Row = {"color": colour, "marker": marker, "markerfacecolor": "white", "markersize": 5, "linestyle": "none"}
    alphas = [alpha for alpha, _ in dropped]
    if dropped and value == "accuracy":
        # its own images may be easier or harder than all: the base on all, and the paired difference
        base = whole[0][1]["accuracy"] if whole else 0.0
        hollow["label"] = f"{CURVES[name]}, dropped early: base on all + paired difference"
        axes.plot(alphas, [100 * (base + row["minus_base"]) for _, row in dropped], **hollow)
    elif dropped:
        errors = [100 * z * row[error] for _, row in dropped]
        hollow |= {"linewidth": 0.8, "label": f"{CURVES[name]}: dropped early, fewer images"}
        axes.errorbar(alphas, [100 * row[value] for _, row in dropped], yerr=errors, **hollow)


def _mark(panels: Sequence["Axes"], choices: Row) -> None:
    """A line at the alpha that the checkpoint carries, and a thin one at either choice that differs from it."""
    chosen = choices["chosen"]["alpha"]
    lines: list[tuple[float, str, Row]] = [
        (chosen, f"chosen ({choices['chosen']['objective']})", {"color": "0.25", "lw": 1.2, "ls": "--"})
    ]
    for who, words in (("paper", "the paper's rule"), ("worst", "the worst case's")):
        if (alpha := choices[who]["alpha"]) != chosen:
            lines.append((alpha, words, {"color": "0.6", "lw": 1.0, "ls": "-."}))
    for i, axes in enumerate(panels):
        for alpha, words, style in lines:
            axes.axvline(alpha, label=None if i else f"{words}: alpha = {alpha:g}", **style)


def draw_eps_curve(results: Row, *, norm: str, title: str, png: Path, svg: Path) -> None:
    """Worst case of both models over eps, the clean accuracy at 0; bands of one standard error around them."""
    grid = [row["eps"] for row in results["eps_curve"]]
    over_255 = all("/255" in eps for eps in grid)
    budgets = [0.0, *((255 if over_255 else 1) * eps_value(eps) for eps in grid)]
    rows = [results["comparisons"][0], *results["eps_curve"]]  # clean is the first comparison

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for model, (colour, marker) in OF_MODELS.items():
            accuracies = [100 * row[f"{model}_accuracy"] for row in rows]
            errors = [100 * row[f"{model}_standard_error"] for row in rows]
            line = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.8, "label": model}
            draw_band(axes, budgets, accuracies, errors, opacity=0.18, **line)
        axes.set_xlabel(f"eps, {norm}" + (", in 1/255" if over_255 else ""))
        axes.set_ylabel("accuracy at its worst (%), ± 1 standard error")
        axes.set_ylim(bottom=0)
        draw_grid(axes)
        axes.legend(loc="best", frameon=False)

    save_figure(draw, (7.2, 4.2), png, svg, title=title, rounded=False)


def draw_distances(
    withstood: Mapping[str, Sequence[float]],
    n_examples: int,
    budgets: Sequence[float],
    *,
    norm: str,
    png: Path,
    svg: Path,
) -> None:
    """The share of ``n_examples`` that is still right at each of ``budgets``: model -> the eps that breaks each robust
    one, infinite where none did."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for model, values in withstood.items():
            left = [100 * sum(value > eps for value in values) / n_examples for eps in budgets]
            colour, marker = OF_MODELS[model]
            axes.plot([255 * eps for eps in budgets], left, color=colour, marker=marker, markersize=3, label=model)
        axes.set_xlabel(f"eps, {norm}, in 1/255, from the budget on")
        axes.set_ylabel("still right (%)")
        axes.set_ylim(bottom=0)
        draw_grid(axes)
        axes.legend(loc="best", frameon=False)

    save_figure(draw, (7.2, 4.2), png, svg, title="Withstood beyond the budget", rounded=False)


def draw_training_curve(
    log: "Sequence[EpochResult]", *, best: int, selected_on: str, title: str, png: Path, svg: Path
) -> None:
    """Accuracies and loss; the best epoch is marked; ``selected_on`` names the split of the accuracies."""
    epochs = [row.epoch + 1 for row in log]
    lines = (
        ([100 * row.selection_accuracy for row in log], BLUE, "o", "clean"),
        ([100 * row.selection_robust_accuracy for row in log], ORANGE, "s", "PGD-10"),
    )

    def draw(figure: "Figure") -> None:
        accuracies, losses = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for values, colour, marker, name in lines:
            label = f"{name}, {values[best]:.1f} % at epoch {best + 1}"
            accuracies.plot(epochs, values, color=colour, marker=marker, markersize=4, linewidth=1.8, label=label)
        accuracies.set_ylabel(f"{selected_on} accuracy (%)")
        draw_legend(accuracies, fontsize=9)
        losses.plot(epochs, [row.train_loss for row in log], color="0.25", linewidth=1.8)
        losses.set_ylabel("training loss")
        losses.set_xlabel("epoch (dashed: the one whose weights were kept)")
        losses.xaxis.get_major_locator().set_params(integer=True)
        for axes in (accuracies, losses):
            axes.axvline(best + 1, color="0.25", linewidth=1.1, linestyle="--")
            draw_grid(axes)

    save_figure(draw, (7.2, 6.0), png, svg, title=title, rounded=False)
