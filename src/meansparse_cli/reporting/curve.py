"""The curve of a sweep, from its report: accuracies over alpha with error bands and the chosen alpha, as PNG and SVG.

Three panels, for the three differ by tens of points and change by a few: clean accuracy; robust accuracy under the plain
attacks, under BPDA and in the worst case; and the paired difference from alpha = 0, whose band is the one to judge by.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with any kind of colour vision; the markers tell them apart in grey.
COLOURS = {"clean": "#0072B2", "plain": "#D55E00", "bpda": "#009E73", "worst": "#000000"}
CLEAN, ROBUST = COLOURS["clean"], COLOURS["plain"]
MARKERS = {"clean": "o", "plain": "s", "bpda": "^", "worst": "D"}
NAMES = {"clean": "clean", "plain": "plain attacks", "bpda": "BPDA", "worst": "worst case"}


def draw_alpha_curve(results: dict[str, Any], *, title: str, png: Path, svg: Path) -> None:
    """Draw the ``results`` of a ``sweep-alpha`` report into ``png`` and ``svg``.

    Needs no display. Equal results give equal bytes. Raises ``DataError`` for no alpha, ``StorageError`` where a file
    cannot be written.
    """
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
        figure.suptitle(title, x=0.02, ha="left", fontsize=11)

    save_figure(draw, (7.2, 9.0), png, svg)


def save_figure(draw: Any, size: tuple[float, float], png: Path, svg: Path) -> None:
    """Call ``draw(figure)`` on a new figure of ``size`` inches and write it twice, with equal bytes for equal content."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.size": 11, "svg.hashsalt": "meansparse", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        # a figure of its own, not pyplot's: no display, no global state, no figure left open
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        _settle(figure)
        with atomic_write(png) as temporary:
            figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
        with atomic_write(svg) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _settle(figure: "Figure") -> None:
    """Lay out once and round: the solver's last digits differ from run to run, and would show in the files."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = (round(value, 5) for value in axes.get_position(original=True).bounds)
        axes.set_position((left, bottom, width, height))


def _draw_accuracy(axes: "Axes", rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    for name in names:
        scored = [(row["alpha"], row[name]) for row in rows if "accuracy" in row[name]]
        n_all = max((row["n_examples"] for _, row in scored), default=0)
        whole = [(alpha, row) for alpha, row in scored if row["n_examples"] == n_all]
        _line(
            axes, name, [alpha for alpha, _ in whole], [100 * row["accuracy"] for _, row in whole],
            [100 * row["standard_error"] for _, row in whole], f"{NAMES[name]} (± 1 standard error)",
        )  # fmt: skip
        base = whole[0][1]["accuracy"] if whole else 0.0
        dropped = [(alpha, row) for alpha, row in scored if row["n_examples"] < n_all]
        if (
            dropped
        ):  # its own images may be easier or harder than all: the base on all of them, and the paired difference
            axes.plot(
                [alpha for alpha, _ in dropped], [100 * (base + row["minus_base"]) for _, row in dropped],
                color=COLOURS[name], marker=MARKERS[name], markerfacecolor="white", markersize=5, linestyle="none",
            )  # fmt: skip
    _finish(axes)


def _draw_gains(axes: "Axes", rows: Sequence[dict[str, Any]], critical_values: dict[str, float]) -> None:
    """Paired differences. An alpha that racing dropped is a hollow marker: it saw fewer examples than the others."""
    for name in ("plain", "worst"):
        scored = [(row["alpha"], row[name]) for row in rows if "minus_base" in row[name]]
        n_all = max((row["n_examples"] for _, row in scored), default=0)
        whole = [(alpha, row) for alpha, row in scored if row["n_examples"] == n_all]
        z = critical_values[name]
        _line(
            axes, name, [alpha for alpha, _ in whole], [100 * row["minus_base"] for _, row in whole],
            [100 * z * row["minus_base_standard_error"] for _, row in whole],
            f"{NAMES[name]} (95 % for all alphas together: ± {z:.2f} standard errors)",
        )  # fmt: skip
        dropped = [(alpha, row) for alpha, row in scored if row["n_examples"] < n_all]
        if dropped:
            axes.errorbar(
                [alpha for alpha, _ in dropped], [100 * row["minus_base"] for _, row in dropped],
                yerr=[100 * z * row["minus_base_standard_error"] for _, row in dropped], color=COLOURS[name],
                marker=MARKERS[name], markerfacecolor="white", markersize=5, linestyle="none", linewidth=0.8,
                label=f"{NAMES[name]}: dropped early, fewer images",
            )  # fmt: skip
    axes.axhline(0, color="0.5", linewidth=0.9, linestyle=":")
    axes.set_ylabel("minus alpha = 0 (points)")
    _finish(axes)


def _line(axes: "Axes", name: str, alphas: list[float], values: list[float], errors: list[float], label: str) -> None:
    low = [value - error for value, error in zip(values, errors, strict=True)]
    high = [value + error for value, error in zip(values, errors, strict=True)]
    axes.fill_between(alphas, low, high, color=COLOURS[name], alpha=0.13, linewidth=0)
    axes.plot(alphas, values, color=COLOURS[name], marker=MARKERS[name], markersize=4, linewidth=1.6, label=label)


def _mark(panels: Sequence["Axes"], choices: dict[str, Any]) -> None:
    """A line at the alpha that the checkpoint carries, and a thin one at either choice that differs from it."""
    chosen = choices["chosen"]["alpha"]
    for i, axes in enumerate(panels):
        label = f"chosen ({choices['chosen']['objective']}): alpha = {chosen:g}"
        axes.axvline(chosen, color="0.25", linewidth=1.2, linestyle="--", label=None if i else label)
        for who, words in (("paper", "the paper's rule"), ("worst", "the worst case's")):
            if (alpha := choices[who]["alpha"]) != chosen:
                axes.axvline(
                    alpha,
                    color="0.6",
                    linewidth=1.0,
                    linestyle="-.",
                    label=None if i else f"{words}: alpha = {alpha:g}",
                )
    panels[0].legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", fontsize=8)


def _finish(axes: "Axes") -> None:
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", fontsize=8)
