"""``meansparse report``: the reports of a run rendered again, as a table, Markdown, JSON or one HTML page.

Nothing is computed: every number is in a YAML file of the run folder, whose hash is checked on reading.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from ..errors import ConfigError
from .console import WIDE, note
from .content import headline, provenance, tables, verdict
from .evaluation_tables import diagnostic_sentences, diagnostics_of, diagnostics_table, show_diagnostics
from .html import html_page
from .reports import Reports, beside, outdated, read_run


def render(folder: Path, format: str, *, width: int, to_file: bool = False) -> str:
    """The run as ``table`` (for a terminal of ``width`` columns, or ``to_file`` and so without colours), ``markdown``,
    ``json`` or ``html``.
    """
    forms: dict[str, Callable[[Reports, list[str]], str]] = {
        "table": lambda reports, warnings: terminal_text(reports, width, warnings, plain=to_file),
        "markdown": markdown,
        "json": lambda reports, _: json.dumps(reports, indent=1, ensure_ascii=False) + "\n",
        "html": lambda reports, warnings: html_page(reports, folder, warnings),
    }
    if format not in forms:
        raise ConfigError(f"format is {format!r}", hint=f"one of {', '.join(forms)}")
    reports = read_run(folder)
    warnings = outdated(reports, folder)
    for sentence in warnings:
        note(f"report: {sentence}")
    for other in beside(folder):
        note(f"beside it: meansparse report {other}")
    return forms[format](reports, warnings)


def terminal_text(reports: Reports, width: int, warnings: Sequence[str] = (), *, plain: bool = False) -> str:
    """Text no wider than ``width`` columns, 80 at least; ``plain``: without colours, wherever it is printed."""
    width = max(width, 80)
    console = Console(width=width, highlight=False, force_terminal=False if plain else None)
    with console.capture() as capture:
        console.print(Text(headline(reports), style="bold"))
        for sentence in warnings:
            console.print(Text(f"OUTDATED: {sentence}", style="bold red"))
        if verdict(reports):
            console.print(Text(f"verdict: {verdict(reports)}\n"))
        for table in tables(reports, with_interval=width >= WIDE):
            console.print(table.to_rich())
        if diagnostics_of(reports.get("evaluate", {}).get("results", {})):
            console.print(show_diagnostics(reports["evaluate"]["results"]))
    return capture.get()


def markdown(reports: Reports, warnings: Sequence[str] = ()) -> str:
    """For a README or an appendix: the tables, the verdict, the diagnostics, and what made them."""
    parts = [f"### {headline(reports)}", *(f"**Outdated: {sentence}.**" for sentence in warnings)]
    parts += [f"**Verdict: {verdict(reports)}.**"] if verdict(reports) else []
    for table in tables(reports):
        parts += [f"{table.title}.", table.to_markdown()]
    results = reports.get("evaluate", {}).get("results", {})
    if diagnostics_of(results):
        table = diagnostics_table(results)
        parts += [f"{table.title}.", table.to_markdown()]
        if sentences := diagnostic_sentences(results, "warn"):
            parts.append("\n".join(f"- {name}: {text}" for name, text in sentences))
    parts.append("\n".join(f"- {name}: `{value}`" for name, value in provenance(reports)))
    return "\n\n".join(parts) + "\n"
