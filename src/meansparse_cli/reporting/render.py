"""``meansparse report``: the reports of a run rendered again, as a table, Markdown, JSON or one HTML page.

Nothing is computed: every number is in a YAML file of the run folder, whose hash is checked on reading.
"""

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from ..engine.outcomes import MODELS
from ..errors import ConfigError
from .console import WIDE, note
from .evaluation_tables import diagnostic_sentences, diagnostics_table, show_diagnostics
from .reports import Reports, beside, headline, outdated, provenance, read_run, results_of, tables, verdict
from .template import environment

MOODS = {"real gain": "good", "gradient masking": "bad", "worse": "bad"}
CURVES = {"sweep-alpha.svg": "Sweep over alpha, held-out images", "eps-curve.svg": "Worst case by eps"}


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
        if results_of(reports, "evaluate").get("doubts"):
            console.print(show_diagnostics(results_of(reports, "evaluate")))
    return capture.get()


def markdown(reports: Reports, warnings: Sequence[str] = ()) -> str:
    """For a README or an appendix: the tables, the verdict, the diagnostics, and what made them."""
    return environment(__package__).get_template("page.md").render(_content(reports, warnings))


def html_page(reports: Reports, folder: Path, warnings: Sequence[str] = ()) -> str:
    """One page with everything inside: no script, no font, no picture from elsewhere; light and dark.

    ``folder`` holds the curves, which become part of it.
    """
    results, page = results_of(reports, "evaluate"), environment(__package__, is_html=True).get_template("page.html")
    return page.render(
        **_content(reports, warnings),
        mood=MOODS.get(results.get("verdict", ""), ""),
        comparisons=results.get("comparisons"),
        models=MODELS,
        curves=list(_curves(reports, folder)),
    )


def _content(reports: Reports, warnings: Sequence[str]) -> dict[str, Any]:
    """What every page says."""
    results = results_of(reports, "evaluate")
    return {
        "headline": headline(reports),
        "warnings": warnings,
        "verdict": verdict(reports),
        "tables": list(tables(reports)),
        "diagnostics": diagnostics_table(results) if results.get("doubts") else None,
        "warned": diagnostic_sentences(results, "warn"),
        "passed": diagnostic_sentences(results, "pass", "not run"),
        "provenance": provenance(reports),
    }


def _curves(reports: Reports, folder: Path) -> Iterator[tuple[str, str]]:
    """(title, base64) of each curve that belongs to these reports: one of an earlier evaluation may still lie there."""
    is_drawn = {
        "sweep-alpha.svg": "sweep-alpha" in reports,
        "eps-curve.svg": "eps_curve" in results_of(reports, "evaluate"),
    }
    for name, title in CURVES.items():
        if is_drawn[name] and (folder / name).exists():
            yield title, base64.b64encode((folder / name).read_bytes()).decode()
