"""Everything people see, on stderr: progress, tables, errors. stdout is for machines and holds paths or JSON."""

import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import typer
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from ..errors import MeanSparseError
from ..foreign import visible
from .heartbeat import Heartbeat, Phase, two_digits


class SafeConsole(Console):
    """A console that obeys its own control codes alone: in a name, a title or an exception they become visible."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Where all text passes on its way to the terminal."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


console = SafeConsole(stderr=True, highlight=False)
if not console.is_terminal:
    console.width = max(console.width, 120)  # a log file has no edge

WIDE = 100
"""Columns from which on a table has room for what it leaves out on a terminal of 80."""


def is_wide() -> bool:
    return console.width >= WIDE


def note(message: str) -> None:
    console.print(message, markup=False)


heartbeat = Heartbeat(None if console.is_terminal else partial(console.print, markup=False, soft_wrap=True))
phase = heartbeat.phase
"""A part of a command, by its name in a log: ``with phase("reading", 200, "images") as part: part.advance(1)``."""


def answer(text: str) -> None:
    """What a command is asked for, on stdout: for people visible, for a machine as it is, in whatever encoding."""
    typer.echo(visible(text) if sys.stdout.isatty() else os.fsencode(text))


class _LibraryNotes(logging.Handler):
    """Shows what the library logs: it never prints by itself."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage())


_library = logging.getLogger("meansparse_cli")
_library.addHandler(_LibraryNotes())
_library.setLevel(logging.INFO)


def _shortened(text: str) -> str:
    """Without the middle of a word of hundreds of letters."""
    return re.sub(r"(\S{100})\S{300,}(\S{40})", r"\1...\2", text)


def show_error(error: MeanSparseError) -> None:
    body = Text(_shortened(error.message))
    if error.hint:
        body.append(f"\n\n{_shortened(error.hint)}", style="bold")
    console.quiet = False
    console.print(Panel(body, title="error", title_align="left", border_style="red"))


@contextmanager
def live(unit: str = "images") -> Iterator["LiveView"]:
    """A progress bar with a table above it, redrawn in place; on a log file, a line from time to time instead."""
    with phase("beginning", unit=unit) as told:
        view = LiveView(unit, told)
        with view.display or nullcontext():
            yield view


class LiveView:
    """What a running stage shows: ``begin`` a bar, ``advance`` it, ``show`` a table above it. A log hears ``told``."""

    def __init__(self, unit: str, told: Phase) -> None:
        self.unit, self.told = unit, told
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=40 if is_wide() else None),  # None: what the words leave
            MofNCompleteColumn(),
            TextColumn(unit),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.table: RenderableType | None = None
        self.display = (
            Live(get_renderable=self._render, console=console, refresh_per_second=4) if console.is_terminal else None
        )

    @property
    def done(self) -> int:
        """Units of the bar that are done."""
        return self.told.done

    def begin(
        self, description: str, total: int | None, done: int = 0, *, work: tuple[float, float] | None = None
    ) -> None:
        """Start the bar anew; ``done`` were finished by an earlier run and do not count for the speed.

        ``work``: what this costs, and all that comes after it, in one unit; None where that cannot be known.
        """
        for task in list(self.progress.task_ids):
            self.progress.remove_task(task)
        self.progress.add_task(escape(description), total=total, completed=done, speed="")
        self.told.begin(description, total, done, work, heartbeat.clock())

    def advance(self, n: int) -> None:
        """``n`` units more."""
        told = self.told
        told.advance(n)
        seconds = heartbeat.clock() - told.started
        speed = f"{two_digits((told.done - told.resumed) / seconds)} {self.unit}/s" if seconds > 0.5 else ""
        for task in self.progress.tasks:
            self.progress.update(task.id, completed=told.done, speed=speed)

    def show(self, table: RenderableType) -> None:
        self.table = table

    def _render(self) -> RenderableType:
        return Group(*[part for part in (self.table, self.progress) if part is not None])
