"""What people see of an evaluation: the tables at the end, and the one that grows while it runs."""

from collections.abc import Callable
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..engine.evaluate import EvaluationProgress
from ..engine.evaluation import MODELS
from .console import WIDE, LiveView
from .tables import TextTable, comparisons_table, doubt_sentences, doubts_table

COLOURS = {"real gain": "bold green", "no difference": "bold", "gradient masking": "bold red", "worse": "bold red"}


def evaluation_table(results: dict[str, Any], title: str, *, width: int) -> Group:
    """Accuracies and paired gains, then the verdict; for a terminal of ``width`` columns, 80 at least.

    ``results`` as in ``evaluate.yaml``.
    """
    table = comparisons_table(results, interval=width >= WIDE)
    verdict = results["verdict"]
    return Group(
        Text(title, style="bold"),
        Text(f"{table.title}; won/lost: examples", style="italic"),
        rich_table(table),
        Text.assemble("verdict: ", (verdict, COLOURS.get(verdict, "bold")), f". {results['reason']}"),
    )


def doubts_view(results: dict[str, Any], *, every: bool = False) -> Group:
    """The table of doubts with the number behind each, and in words what warns (or, with ``every``, all of them)."""
    table = doubts_table(results)
    parts: list[RenderableType] = [Text(table.title, style="bold"), rich_table(table, strong="bold red")]
    for name, sentence in doubt_sentences(results, *(() if every else ("warn",))):
        parts.append(Text.assemble((f"{name}: ", "bold"), sentence))
    return Group(*parts)


def rich_table(table: TextTable, *, strong: str = "bold") -> Table:
    """For the terminal: names to the left and numbers to the right, none of them broken over two lines."""
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, column in enumerate(table.header):
        shown.add_column(column, justify="right" if i else "left", no_wrap=bool(i), overflow="fold")
    for i, row in enumerate(table.rows):
        shown.add_row(*(Text(cell) for cell in row), style=strong if i in table.strong else None)
    return shown


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
