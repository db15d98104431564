"""The one table: plain text in rows and columns, shown on a terminal, in Markdown and (``html``) on a page."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from ..foreign import visible


@dataclass(frozen=True)
class Table:
    """``rows`` under ``header``; ``strong``: the rows that stand out.

    ``kinds``, a letter a column: ``n`` a number, to the right; ``t`` text that stays in one piece; ``f`` text that
    folds where there is no room. Left out: the first column folds, the others are numbers.
    """

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    strong: frozenset[int] = frozenset()
    kinds: str = ""

    @classmethod
    def of(cls, title: str, columns: Mapping[str, Iterable[str]], **more: Any) -> "Table":
        return cls(title, tuple(columns), list(zip(*columns.values(), strict=True)), **more)

    def kind(self, column: int) -> str:
        return self.kinds[column] if self.kinds else "n" if column else "f"

    def to_rich(self, *, strong: str = "bold") -> Group:
        """For the terminal, under its title where it has one."""
        title = [Text(self.title, style="bold")] if self.title else []
        return Group(*title, self.body(strong=strong))

    def body(self, *, strong: str = "bold") -> RichTable:
        """For the terminal, without the title."""
        shown = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for i, name in enumerate(self.header):
            kind = self.kind(i)
            shown.add_column(  # where there is no room, the widest column folds first, a number between its words
                Text(name), justify="right" if kind == "n" else "left", no_wrap=kind == "t", overflow="fold"
            )
        for i, row in enumerate(self.rows):
            shown.add_row(*(Text(cell) for cell in row), style=strong if i in self.strong else None)
        return shown

    def to_markdown(self) -> str:
        """Pipes and dashes; the rows that stand out in bold."""
        dashes = "|".join("---:" if self.kind(i) == "n" else "---" for i in range(len(self.header)))
        lines = [pipes(self.header), f"|{dashes}|"]
        for i, row in enumerate(self.rows):
            lines.append(pipes([f"**{cell}**" if i in self.strong and cell else cell for cell in row]))
        return "\n".join(lines)


def pipes(cells: Iterable[object]) -> str:
    """A row of a table in Markdown; None is empty."""
    return (
        "| "
        + " | ".join(("" if cell is None else visible(str(cell), keep="")).replace("|", "\\|") for cell in cells)
        + " |"
    )
