"""Everything people see, on stderr: progress, tables, errors. stdout is for machines and holds paths or JSON."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..errors import MeanSparseError

if TYPE_CHECKING:
    from ..sites.find import Site

console = Console(stderr=True, highlight=False)
if not console.is_terminal:
    console.width = max(console.width, 120)  # a log file has no edge

SECONDS_BETWEEN_LINES = 30.0
WIDE = 100
"""Columns from which on a table has room for what it leaves out on a terminal of 80."""


def note(message: str) -> None:
    """One line for people."""
    console.print(message, markup=False)


def show_error(error: MeanSparseError) -> None:
    """What was found and expected, and the command that mends it."""
    body = Text(error.message)
    if error.hint:
        body.append(f"\n\n{error.hint}", style="bold")
    console.print(Panel(body, title="error", title_align="left", border_style="red"))


@contextmanager
def live(unit: str = "images") -> Iterator["LiveView"]:
    """A progress bar with a table above it, redrawn in place; on a log file, a line from time to time instead."""
    view = LiveView(unit)
    with view.display if view.display is not None else _nothing():
        yield view


class LiveView:
    """What a running stage shows: ``begin`` a bar, ``advance`` it, ``show`` a table above it."""

    def __init__(self, unit: str) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=40 if console.width >= WIDE else None),  # None: what the words leave
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.unit = unit
        self.table: RenderableType | None = None
        self.display = (
            Live(get_renderable=self._render, console=console, refresh_per_second=4) if console.is_terminal else None
        )
        self._task: TaskID | None = None
        self._description = ""
        self._total: int | None = None
        self._last_line = time.monotonic()
        self._started = time.monotonic()
        self.done = 0
        self._resumed = 0

    def begin(self, description: str, total: int | None, done: int = 0) -> None:
        """Start the bar anew; ``done`` were finished by an earlier run and do not count for the speed."""
        for task in list(self.progress.task_ids):
            self.progress.remove_task(task)
        self._task = self.progress.add_task(escape(description), total=total, completed=done, speed="")
        self._description, self._total, self.done, self._resumed = description, total, done, done
        self._started = time.monotonic()

    def advance(self, n: int) -> None:
        """``n`` more are done."""
        self.done += n
        seconds = time.monotonic() - self._started
        speed = f"{_two_digits((self.done - self._resumed) / seconds)} {self.unit}/s" if seconds > 0.5 else ""
        if self._task is not None:
            self.progress.update(self._task, completed=self.done, speed=speed)
        if self.display is None and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            of = f" of {self._total:,}" if self._total else ""
            note(f"{self._description}: {self.done:,}{of} {self.unit} {speed}")

    def show(self, table: RenderableType) -> None:
        """Put a table above the bar."""
        self.table = table

    def _render(self) -> RenderableType:
        return Group(*[part for part in (self.table, self.progress) if part is not None])


def _two_digits(number: float) -> str:
    """``1,234``, ``12``, ``3.4``, ``0.12``."""
    return f"{number:,.0f}" if number >= 9.95 else f"{number:.2g}"


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def bar(description: str, total: int | None, unit: str = "images") -> Iterator[Callable[[int], None]]:
    """A progress bar with speed and time left; yields the function that advances it."""
    with live(unit) as view:
        view.begin(description, total)
        yield view.advance


_AXES = {"channels-first": "NCHW", "channels-last": "NHWC", "tokens": "NLC", "flat": "NC"}


def sites_table(sites: Sequence["Site"], chosen_by: Mapping[int, str]) -> Table:
    """All sites of a model, the ones in use with the part of the rule that chose them; a function is followed by ()."""
    n_gates = sum(site.gate for site in sites)
    title = f"{len(chosen_by)} of {len(sites)} sites chosen" + (
        f"; {n_gates} of the {len(sites)} are gates" if n_gates else ""
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("site", overflow="fold")
    table.add_column("activation", no_wrap=True)
    table.add_column("layout", no_wrap=True)
    table.add_column("ch", justify="right", no_wrap=True)
    table.add_column("place", no_wrap=True)
    table.add_column("chosen by", overflow="fold", min_width=14)
    for site in sites:
        called = site.operation if site.kind == "module" else f"{site.operation}()"
        layout = _AXES[site.layout] if len(site.shape) < 4 else site.layout
        place = "gate" if site.gate else "addition" if site.after_addition else "main path" if site.main_path else ""
        chosen = chosen_by.get(site.index, "-")
        style = None if site.index in chosen_by else "dim"
        row = [str(site.index), site.name, called, layout, str(site.channels), place, chosen]
        table.add_row(*[escape(cell) for cell in row], style=style)
    return table


def percent(fraction: float, standard_error: float | None = None, *, signed: bool = False) -> str:
    """A fraction as a percentage, with its standard error in points."""
    text = f"{100 * fraction:+.2f}" if signed else f"{100 * fraction:.2f}"
    return text if standard_error is None else f"{text} ± {100 * standard_error:.2f}"
