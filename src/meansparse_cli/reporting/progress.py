"""The tables that grow while a stage runs."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType

from ..engine.outcomes import MODELS
from ..stats.format import percent
from .console import LiveView
from .table import Table

if TYPE_CHECKING:
    from ..engine.evaluate import EvaluationProgress
    from ..training.state import EpochResult

EPOCHS_ON_SCREEN = 12


def show_attacks(view: LiveView) -> "Callable[[EvaluationProgress], None]":
    """The function that keeps ``view`` up to date: a row an attack, how many examples are still right."""
    current: tuple[str, str] | None = None

    def on_update(progress: "EvaluationProgress") -> None:
        nonlocal current
        if (progress.model, progress.attack) != current:
            current = (progress.model, progress.attack)
            view.begin(f"{progress.attack} on {progress.model}", progress.n_total, progress.n_resumed)
        view.advance(progress.n_done - view.done)
        rows: list[tuple[str, ...]] = []
        for attack in dict.fromkeys(name for counts in progress.n_robust.values() for name in counts):
            counts = [progress.n_robust.get(model, {}).get(attack) for model in MODELS]
            rows.append((attack, *("" if count is None else f"{count:,}" for count in counts)))
        header = ("after", *(f"{model}, still right" for model in MODELS))
        view.show(Table(f"of {progress.n_examples:,} examples", header, rows).to_rich())

    return on_update


def show_epochs(log: "Sequence[EpochResult]", best: int, selected_on: str) -> RenderableType:
    """The last epochs of a training run, the best one marked; ``selected_on`` names the split of the accuracies."""
    rows = [
        (
            str(row.epoch + 1),
            f"{row.train_loss:.3f}",
            percent(row.selection_accuracy),
            percent(row.selection_robust_accuracy),
            f"{row.seconds:.1f}",
            "best" if row.epoch == best else "",
        )
        for row in log[-EPOCHS_ON_SCREEN:]
    ]
    header = ("epoch", "loss", f"{selected_on} clean %", f"{selected_on} PGD-10 %", "seconds", "")
    return Table("training", header, rows, kinds="nnnnnn").to_rich()
