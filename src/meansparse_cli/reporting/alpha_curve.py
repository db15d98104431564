"""The curve of a sweep, from its report: accuracies over alpha with error bands and the chosen alpha, as PNG and SVG.

Three panels, for the three differ by tens of points and change by a few: clean accuracy; robust accuracy under the
plain attacks, under BPDA and in the worst case; and the paired difference from alpha = 0, whose band is the one to
judge by.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .figure import BLACK, BLUE, GREEN, ORANGE, draw_band, draw_grid, save_figure
from .sweep_tables import CURVES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

COLOURS = {"clean": BLUE, "plain": ORANGE, "bpda": GREEN, "worst": BLACK}
MARKERS = {"clean": "o", "plain": "s", "bpda": "^", "worst": "D"}


def draw_alpha_curve(results: Row, *, title: str, png: Path, svg: Path) -> None:
    """Draw the ``results`` of a ``sweep-alpha`` report into ``png`` and ``svg``. Raises ``DataError`` for no alpha."""
    rows = sorted(results["curve"], key=lambda row: row["alpha"])
    if not rows:
        raise DataError("a curve needs at least one alpha")

    def draw(figure: "Figure") -> None:
        clean_axes, robust_axes, gain_axes = figure.subplots(3, 1, sharex=True, height_ratios=[2, 3, 3])
        _draw_accuracy(clean_axes, rows, ["clean"])
        clean_axes.set_ylabel("clean accuracy (%)")
        _draw_accuracy(robust_axes, rows, ["plain", "bpda", "worst"])
        robust_axes.set_ylabel("robust accuracy (%)")
        _draw_gains(gain_axes, rows, results["critical_values"])
        gain_axes.set_xlabel("alpha (standard deviations; 0 = base model)")
        _mark(figure.axes, results["choices"])

    save_figure(draw, (7.2, 9.0), png, svg, title=title)


def _draw_accuracy(axes: "Axes", rows: Sequence[Row], names: Sequence[str]) -> None:
    for name in names:
        whole, dropped = _scored(rows, name, "accuracy")
        _line(axes, name, whole, "accuracy", "standard_error", 1.0, f"{CURVES[name]} (± 1 standard error)")
        if dropped:  # its own images may be easier or harder than all: the base on all, and the paired difference
            base = whole[0][1]["accuracy"] if whole else 0.0
            heights = [100 * (base + row["minus_base"]) for _, row in dropped]
            axes.plot([alpha for alpha, _ in dropped], heights, **_hollow(name))
    _finish(axes)


def _draw_gains(axes: "Axes", rows: Sequence[Row], critical_values: dict[str, float]) -> None:
    """Paired differences. An alpha that racing dropped is a hollow marker: it saw fewer examples than the others."""
    for name in ("plain", "worst"):
        whole, dropped = _scored(rows, name, "minus_base")
        z = critical_values[name]
        label = f"{CURVES[name]} (95 % for all alphas together: ± {z:.2f} standard errors)"
        _line(axes, name, whole, "minus_base", "minus_base_standard_error", z, label)
        if dropped:
            axes.errorbar(
                [alpha for alpha, _ in dropped],
                [100 * row["minus_base"] for _, row in dropped],
                yerr=[100 * z * row["minus_base_standard_error"] for _, row in dropped],
                linewidth=0.8,
                label=f"{CURVES[name]}: dropped early, fewer images",
                **_hollow(name),
            )
    axes.axhline(0, color="0.5", linewidth=0.9, linestyle=":")
    axes.set_ylabel("minus alpha = 0 (points)")
    _finish(axes)


def _scored(rows: Sequence[Row], name: str, value: str) -> tuple[list[tuple[float, Row]], list[tuple[float, Row]]]:
    """(alpha, its row of one curve) where there is a ``value``: those on all examples, and those that were dropped."""
    scored = [(row["alpha"], row[name]) for row in rows if value in row[name]]
    n_all = max((row["n_examples"] for _, row in scored), default=0)
    whole = [(alpha, row) for alpha, row in scored if row["n_examples"] == n_all]
    return whole, [(alpha, row) for alpha, row in scored if row["n_examples"] < n_all]


def _line(
    axes: "Axes", name: str, scored: list[tuple[float, Row]], value: str, error: str, z: float, label: str
) -> None:
    """Percentages over alpha, with a band of ``z`` standard errors."""
    draw_band(
        axes,
        [alpha for alpha, _ in scored],
        [100 * row[value] for _, row in scored],
        [100 * z * row[error] for _, row in scored],
        opacity=0.13,
        color=COLOURS[name],
        marker=MARKERS[name],
        markersize=4,
        linewidth=1.6,
        label=label,
    )


def _hollow(name: str) -> dict[str, Any]:
    return {
        "color": COLOURS[name],
        "marker": MARKERS[name],
        "markerfacecolor": "white",
        "markersize": 5,
        "linestyle": "none",
    }


def _mark(panels: Sequence["Axes"], choices: dict[str, Any]) -> None:
    """A line at the alpha of the checkpoint, and a thin one at either choice that differs from it."""
    chosen = choices["chosen"]["alpha"]
    lines: list[tuple[float, str, dict[str, Any]]] = [
        (chosen, f"chosen ({choices['chosen']['objective']})", {"color": "0.25", "lw": 1.2, "ls": "--"})
    ]
    for who, words in (("paper", "the paper's rule"), ("worst", "the worst case's")):
        if (alpha := choices[who]["alpha"]) != chosen:
            lines.append((alpha, words, {"color": "0.6", "lw": 1.0, "ls": "-."}))
    for i, axes in enumerate(panels):
        for alpha, words, style in lines:
            axes.axvline(alpha, label=None if i else f"{words}: alpha = {alpha:g}", **style)
    _legend(panels[0])


def _finish(axes: "Axes") -> None:
    draw_grid(axes)
    _legend(axes)


def _legend(axes: "Axes") -> None:
    axes.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", fontsize=8)
