"""What people see of an evaluation: the table at the end, and the one that grows while it runs."""

from collections.abc import Callable

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .console import LiveView, percent
from .evaluate import EvaluationProgress
from .evaluation import MODELS, WORST_CASE, Evaluation

COLOURS = {"real gain": "bold green", "no difference": "bold", "gradient masking": "bold red", "worse": "bold red"}


def evaluation_table(evaluation: Evaluation, title: str) -> Group:
    """Clean, each attack or group whose number is known, worst case: base, sparsified, paired gain; then the verdict."""
    table = Table(title=f"{title} (± standard error; gains are paired)", title_justify="left")
    table.add_column("")
    for column in ("base %", "sparsified %", "gain, points", "95 % interval", "won / lost"):
        table.add_column(column, justify="right")
    for row in evaluation.comparisons:
        low, high = row.gain.interval_95
        table.add_row(
            row.name, percent(row.base.fraction, row.base.standard_error),
            percent(row.sparsified.fraction, row.sparsified.standard_error),
            percent(row.gain.difference, row.gain.standard_error, signed=True),
            f"{100 * low:+.1f} to {100 * high:+.1f}", f"{row.gain.gained} / {row.gain.lost}",
            style="bold" if row.name == WORST_CASE else None,
        )  # fmt: skip
    verdict = evaluation.verdict
    return Group(
        table, Text.assemble("verdict: ", (verdict.name, COLOURS.get(verdict.name, "bold")), f". {verdict.reason}")
    )


def progress_table(view: LiveView) -> Callable[[EvaluationProgress], None]:
    """The function that keeps ``view`` up to date: a row an attack, how many examples are still right."""
    current: tuple[str, str] | None = None

    def on_update(progress: EvaluationProgress) -> None:
        nonlocal current
        if (progress.model, progress.attack) != current:
            current = (progress.model, progress.attack)
            view.begin(f"{progress.attack} on {progress.model}", progress.n_total, progress.n_resumed)
        view.advance(progress.n_done - view.done)
        table = Table("after", *(f"{model}, still right" for model in MODELS), title=f"of {progress.n_examples:,} examples", title_justify="left")  # fmt: skip
        for attack in dict.fromkeys(name for counts in progress.n_robust.values() for name in counts):
            counts = [progress.n_robust.get(model, {}).get(attack) for model in MODELS]
            table.add_row(attack, *("" if count is None else f"{count:,}" for count in counts))
        view.show(table)

    return on_update
