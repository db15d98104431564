"""What every figure shares: its style, a line with its error band, and files that are equal for equal content."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart with any kind of colour vision; the markers tell them apart in grey.
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"


def save_figure(
    draw: "Callable[[Figure], None]",
    size: tuple[float, float],
    png: Path,
    svg: Path,
    *,
    title: str,
    rounded: bool = True,
) -> None:
    """Call ``draw(figure)`` on a new figure of ``size`` inches and write it twice, with equal bytes for equal content.

    ``rounded``: places of the axes to five digits, where the solver's last ones differ from run to run. Needs no
    display. Raises ``StorageError`` where a file cannot be written.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.size": 11, "svg.hashsalt": "meansparse", "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        # a figure of its own, not pyplot's: no display, no global state, no figure left open
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.suptitle(title, x=0.02, ha="left", fontsize=11)
        if rounded:  # laid out once: the solver's last digits differ from run to run, and would show in the files
            figure.draw_without_rendering()
            figure.set_layout_engine("none")
            for axes in figure.axes:
                left, bottom, width, height = (round(at, 5) for at in axes.get_position(original=True).bounds)
                axes.set_position((left, bottom, width, height))
        with atomic_write(png) as temporary:
            figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
        with atomic_write(svg) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})


def draw_band(
    axes: "Axes", x: Sequence[float], values: Sequence[float], errors: Sequence[float], *, opacity: float, **line: Any
) -> None:
    low = [value - error for value, error in zip(values, errors, strict=True)]
    high = [value + error for value, error in zip(values, errors, strict=True)]
    axes.fill_between(x, low, high, color=line["color"], alpha=opacity, linewidth=0)
    axes.plot(x, values, **line)


def draw_grid(axes: "Axes") -> None:
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def draw_legend(axes: "Axes", *, fontsize: int) -> None:
    """Where there is room, on a ground that lets little through."""
    axes.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", fontsize=fontsize)
