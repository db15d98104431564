"""The curve of a sweep: clean and robust accuracy over alpha, with error bands and the chosen alpha, as PNG and SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .accuracy import Accuracy
from .artifacts import atomic_write
from .errors import DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's blue and vermilion: told apart with any kind of colour vision, and by their lightness in grey.
CLEAN, ROBUST = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class AlphaPoint:
    """The accuracies of one alpha."""

    alpha: float
    clean: Accuracy
    robust: Accuracy


def draw_alpha_curve(points: Sequence[AlphaPoint], *, chosen_alpha: float, title: str, png: Path, svg: Path) -> None:
    """Draw ``points`` in order of alpha, bands of one standard error around them, into ``png`` and ``svg``.

    Needs no display. Equal points give equal bytes. Raises ``DataError`` for no point, ``StorageError`` where a file
    cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not points:
        raise DataError("a curve needs at least one alpha")
    points = sorted(points, key=lambda point: point.alpha)
    style: Any = {"font.size": 11, "svg.hashsalt": "meansparse", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        # a figure of its own, not pyplot's: no display, no global state, no figure left open
        figure = Figure(figsize=(7.2, 6.0), layout="constrained")
        FigureCanvasAgg(figure)
        clean_axes, robust_axes = figure.subplots(2, 1, sharex=True)
        _draw_accuracy(clean_axes, points, [p.clean for p in points], chosen_alpha, CLEAN, "o", "clean accuracy (%)")
        _draw_accuracy(
            robust_axes, points, [p.robust for p in points], chosen_alpha, ROBUST, "s", "robust accuracy (%)"
        )
        robust_axes.set_xlabel("alpha (standard deviations; 0 = base model)")
        figure.suptitle(title, x=0.02, ha="left", fontsize=11)
        with atomic_write(png) as temporary:
            figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
        with atomic_write(svg) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def _draw_accuracy(
    axes: "Axes",
    points: Sequence[AlphaPoint],
    accuracies: Sequence[Accuracy],
    chosen_alpha: float,
    colour: str,
    marker: str,
    label: str,
) -> None:
    """One accuracy over alpha. The two differ by tens of points and change by a few: each has an axis of its own."""
    alphas = [point.alpha for point in points]
    values = [100 * accuracy.fraction for accuracy in accuracies]
    errors = [100 * accuracy.standard_error for accuracy in accuracies]
    low = [value - error for value, error in zip(values, errors, strict=True)]
    high = [value + error for value, error in zip(values, errors, strict=True)]
    axes.fill_between(alphas, low, high, color=colour, alpha=0.18, linewidth=0, label="± 1 standard error")
    axes.plot(alphas, values, color=colour, marker=marker, markersize=5, linewidth=1.8)
    axes.axhline(
        values[0], color="0.5", linewidth=0.9, linestyle=":", label=f"alpha = {alphas[0]:g}: {values[0]:.1f} %"
    )
    axes.axvline(chosen_alpha, color="0.25", linewidth=1.1, linestyle="--")
    for alpha, value in zip(alphas, values, strict=True):
        if alpha == chosen_alpha:
            axes.plot(
                [alpha], [value], marker=marker, markersize=11, color=colour, markeredgecolor="black", linestyle="none",
                label=f"chosen, alpha = {alpha:g}: {value:.1f} %",
            )  # fmt: skip
    axes.set_ylabel(label)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", fontsize=9)
