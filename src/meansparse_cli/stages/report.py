"""``meansparse report``: a run's reports again, as tables, Markdown, JSON or one page."""

from __future__ import annotations

from pathlib import Path

from ..files import write_bytes
from ..reporting.render import render


def report(run: Path, *, format: str, output: Path | None, width: int) -> str:
    """What stdout gets: the report, ``width`` columns wide; or the path of ``output``, once it is written there."""
    text = render(run, format, width=width, to_file=output is not None)
    if output is None:
        return text
    write_bytes(output, text.encode())
    return f"{output}\n"
