"""One HTML page for a run, with everything inside: no script, no font, no picture from elsewhere; light and dark."""

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from ..engine.outcomes import MODELS
from .content import headline, provenance, tables, verdict
from .evaluation_tables import diagnostic_sentences, diagnostics_of, diagnostics_table
from .reports import Reports

MOODS = {"real gain": "good", "gradient masking": "bad", "worse": "bad"}
CURVES = {"sweep-alpha.svg": "Sweep over alpha, held-out images", "eps-curve.svg": "Worst case by eps"}
CLASSES = {"WARN": "warn", "pass": "pass", "not run": "none"}


def html_page(reports: Reports, folder: Path, warnings: Sequence[str] = ()) -> str:
    """The run as one page. ``folder`` holds the curves, which become part of it."""
    results = reports.get("evaluate", {}).get("results", {})
    return (
        _environment()
        .get_template("page.html")
        .render(
            headline=headline(reports),
            warnings=warnings,
            verdict=verdict(reports),
            mood=MOODS.get(results.get("verdict", ""), ""),
            comparisons=results.get("comparisons"),
            models=MODELS,
            tables=list(tables(reports)),
            diagnostics=diagnostics_table(results) if diagnostics_of(results) else None,
            details=(
                ("What warns", True, diagnostic_sentences(results, "warn")),
                ("What passed, or was not run", False, diagnostic_sentences(results, "pass", "not run")),
            ),
            curves=list(_curves(reports, folder)),
            provenance=provenance(reports),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("meansparse_cli.reporting"),
        autoescape=True,
        finalize=_escaped,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"class_of": _class_of, "in_range": lambda fraction: min(max(fraction, 0.0), 1.0)}
    return environment


def _escaped(value: Any) -> Markup:
    """As ``html.escape`` writes quotes, which is how pages have always been written."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def _curves(reports: Reports, folder: Path) -> Iterator[tuple[str, str]]:
    """(title, base64) of each curve that belongs to these reports: one of an earlier evaluation may still lie there."""
    results = reports.get("evaluate", {}).get("results", {})
    is_drawn = {"sweep-alpha.svg": "sweep-alpha" in reports, "eps-curve.svg": "eps_curve" in results}
    for name, title in CURVES.items():
        if is_drawn[name] and (folder / name).exists():
            yield title, base64.b64encode((folder / name).read_bytes()).decode()


def _class_of(cell: str) -> str:
    """What a cell of the diagnostics warns of, as a class of the style sheet."""
    return next((name for word, name in CLASSES.items() if cell == word or cell.startswith(f"{word} ")), "")
