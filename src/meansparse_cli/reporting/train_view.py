"""What people see of a training run: the table while it runs, the curve afterwards."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic_write
from .console import percent
from .curve import CLEAN, ROBUST

if TYPE_CHECKING:
    from rich.table import Table

    from ..training.state import EpochResult

LOSS = "0.25"


def log_table(log: "list[EpochResult]", best: int, selected_on: str) -> "Table":
    """The last epochs, the best one marked; ``selected_on`` names the split of the accuracies."""
    from rich.table import Table

    table = Table(title="training", title_justify="left")
    for column in ("epoch", "loss", f"{selected_on} clean %", f"{selected_on} PGD-10 %", "seconds", ""):
        table.add_column(column, justify="right")
    for row in log[-12:]:
        table.add_row(
            str(row.epoch + 1), f"{row.train_loss:.3f}", percent(row.selection_accuracy),
            percent(row.selection_robust_accuracy), f"{row.seconds:.1f}", "best" if row.epoch == best else "",
        )  # fmt: skip
    return table


def draw_training_curve(
    log: "list[EpochResult]", *, best: int, selected_on: str, title: str, png: Path, svg: Path
) -> None:
    """Accuracies and loss by epoch, the best epoch marked, into ``png`` and ``svg``; equal logs give equal bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"font.size": 11, "svg.hashsalt": "meansparse", "axes.spines.top": False, "axes.spines.right": False}
    epochs = [row.epoch + 1 for row in log]
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.2, 6.0), layout="constrained")
        FigureCanvasAgg(figure)
        accuracies, losses = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        for values, colour, marker, label in (
            ([100 * row.selection_accuracy for row in log], CLEAN, "o", "clean"),
            ([100 * row.selection_robust_accuracy for row in log], ROBUST, "s", "PGD-10"),
        ):
            accuracies.plot(epochs, values, color=colour, marker=marker, markersize=4, linewidth=1.8,
                            label=f"{label}, {values[best]:.1f} % at epoch {best + 1}")  # fmt: skip
        accuracies.set_ylabel(f"{selected_on} accuracy (%)")
        accuracies.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", fontsize=9)
        losses.plot(epochs, [row.train_loss for row in log], color=LOSS, linewidth=1.8)
        losses.set_ylabel("training loss")
        losses.set_xlabel("epoch (dashed: the one whose weights were kept)")
        losses.xaxis.get_major_locator().set_params(integer=True)
        for axes in (accuracies, losses):
            axes.axvline(best + 1, color="0.25", linewidth=1.1, linestyle="--")
            axes.grid(axis="y", color="0.9", linewidth=0.8)
            axes.set_axisbelow(True)
        figure.suptitle(title, x=0.02, ha="left", fontsize=11)
        with atomic_write(png) as temporary:
            figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})
        with atomic_write(svg) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
