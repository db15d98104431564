"""Accuracies and loss of a training run by epoch."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .figure import BLUE, ORANGE, draw_grid, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..training.state import EpochResult

LOSS = "0.25"


def draw_training_curve(
    log: "Sequence[EpochResult]", *, best: int, selected_on: str, title: str, png: Path, svg: Path
) -> None:
    """The best epoch is marked; ``selected_on`` names the split of the accuracies."""
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
        accuracies.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", fontsize=9)
        losses.plot(epochs, [row.train_loss for row in log], color=LOSS, linewidth=1.8)
        losses.set_ylabel("training loss")
        losses.set_xlabel("epoch (dashed: the one whose weights were kept)")
        losses.xaxis.get_major_locator().set_params(integer=True)
        for axes in (accuracies, losses):
            axes.axvline(best + 1, color="0.25", linewidth=1.1, linestyle="--")
            draw_grid(axes)

    save_figure(draw, (7.2, 6.0), png, svg, title=title, rounded=False)
