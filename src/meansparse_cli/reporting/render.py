"""``meansparse report``: the reports of a run, read for people, as a table, Markdown, JSON or one HTML page.

Nothing is computed: every number is in a YAML file of the run folder, whose hash is checked on reading.
"""

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.text import Text

from ..engine.outcomes import MODELS
from ..errors import ArtifactError, ConfigError
from ..files import sha256_of
from ..runs.report import STAGES, RunPaths, machine_of, read_report, stage_command
from ..settings.shard import shard_of
from .console import WIDE, SafeConsole, note
from .evaluation_tables import (
    attacks_table,
    comparisons_table,
    diagnostic_sentences,
    diagnostics_of,
    diagnostics_table,
    distances_table,
    eps_table,
    masked_by_site,
    show_diagnostics,
)
from .examples import examples_csv
from .sweep_tables import measurement_table, sweep_table
from .table import Table
from .template import fill

Reports = dict[str, dict[str, Any]]
CODE_NOT_SEEN = "no operator in code whose insides cannot be seen"
MOODS = {"real gain": "good", "gradient masking": "bad", "worse": "bad"}


def render(folder: Path, format: str, *, width: int, to_file: bool = False) -> str:
    """The run as ``table`` (for a terminal of ``width`` columns, or ``to_file`` and so without colours), ``markdown``,
    ``json`` or ``html``; or its examples as ``csv``.
    """
    forms: dict[str, Callable[[Reports, list[str]], str]] = {
        "table": lambda reports, warnings: terminal_text(reports, width, warnings, plain=to_file),
        "markdown": markdown,
        "json": lambda reports, _: json.dumps(reports, indent=1, ensure_ascii=False) + "\n",
        "html": lambda reports, warnings: html_page(reports, folder, warnings),
        "csv": lambda reports, _: examples_csv(
            reports.get("evaluate"), folder, mend=_command("evaluate", folder, run_of(folder))
        ),
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
    console = SafeConsole(width=width, highlight=False, force_terminal=False if plain else None)
    with console.capture() as capture:
        console.print(Text(headline(reports), style="bold"))
        for sentence in warnings:
            console.print(Text(f"OUTDATED: {sentence}", style="bold red"))
        if code := code_not_seen(reports):
            console.print(Text(f"{CODE_NOT_SEEN}: {code}"))
        if verdict(reports):
            console.print(Text(f"verdict: {verdict(reports)}\n"))
        for table in tables(reports, with_interval=width >= WIDE):
            console.print(table.to_rich())
        if diagnostics_of(results_of(reports, "evaluate")):
            console.print(show_diagnostics(results_of(reports, "evaluate")))
    return capture.get()


def markdown(reports: Reports, warnings: Sequence[str] = ()) -> str:
    """For a README or an appendix: the tables, the verdict, the diagnostics, and what made them."""
    return fill(__package__, "page.md", **_content(reports, warnings))


def html_page(reports: Reports, folder: Path, warnings: Sequence[str] = ()) -> str:
    """One page with everything inside, the curves in ``folder`` too: no script, no font, no picture from elsewhere."""
    results = results_of(reports, "evaluate")
    return fill(
        __package__,
        "page.html",
        is_html=True,
        **_content(reports, warnings),
        mood=MOODS.get(results.get("verdict", ""), ""),
        comparisons=results.get("comparisons"),
        attacks=results.get("attacks"),
        masked=masked_by_site(results),
        has_gallery=has_gallery(reports),
        models=MODELS,
        curves=list(_curves(reports, folder)),
    )


def _content(reports: Reports, warnings: Sequence[str]) -> dict[str, Any]:
    results = results_of(reports, "evaluate")
    return {
        "headline": headline(reports),
        "warnings": warnings,
        "verdict": verdict(reports),
        "tables": list(tables(reports)),
        "diagnostics": diagnostics_table(results) if diagnostics_of(results) else None,
        "warned": diagnostic_sentences(results, "warn"),
        "passed": diagnostic_sentences(results, "pass", "too few", "not run"),
        "provenance": provenance(reports),
    }


def _curves(reports: Reports, folder: Path) -> Iterator[tuple[str, str]]:
    """(title, base64) of each curve that belongs to these reports: one of an earlier evaluation may still lie there."""
    evaluated = results_of(reports, "evaluate")
    gallery = "The first examples that were broken: clean, adversarial, and the difference, eps black or white"
    distances = "What the examples that withstood everything withstand beyond the budget"
    for name, is_drawn, title in (
        ("sweep-alpha.svg", "sweep-alpha" in reports, "Sweep over alpha, held-out images"),
        ("eps-curve.svg", "eps_curve" in evaluated, "Worst case by eps"),
        ("gallery.svg", has_gallery(reports), gallery),
        ("distances.svg", "distances" in evaluated, distances),
    ):
        if is_drawn and (folder / name).exists():
            yield title, base64.b64encode((folder / name).read_bytes()).decode()


def has_gallery(reports: Reports) -> bool:
    return "witnesses.safetensors" in reports.get("evaluate", {}).get("outputs", {})


def read_run(folder: Path) -> Reports:
    """Stage -> its report, for every stage of the run that is there; for a named evaluation, a measurement or a shard,
    its own report and fetch's and calibrate's of its run.

    Raises ``ArtifactError`` for none, or an edited one.
    """
    if not folder.is_dir():
        raise ArtifactError(f"no run folder {folder}", hint="meansparse run --model digits makes one")
    root = run_of(folder)
    places = {stage: folder if folder == root or stage in ("evaluate", "measure") else root for stage in STAGES}
    if folder != root:
        del places["sweep-alpha"]
    reports = {
        stage: read_report(RunPaths(place).report(stage), stage, mend=_command(stage, place, root))
        for stage, place in places.items()
        if RunPaths(place).report(stage).exists()
    }
    if not reports:
        raise ArtifactError(f"{folder} holds no report", hint="expected fetch.yaml, calibrate.yaml, ... evaluate.yaml")
    return reports


def _command(stage: str, place: Path, root: Path) -> str:
    shard = None
    if place.parent.name == "shards":
        shard, place = shard_of(place.name), place.parent.parent
    return stage_command(stage, root, None if place == root else place.name, shard)


def run_of(folder: Path) -> Path:
    """The run folder that a named evaluation, a measurement or a shard belongs to; a run's own is its own."""
    parts = ("evaluations", "measurements", "shards")
    while folder.parent.name in parts and not RunPaths(folder).report("fetch").exists():
        folder = folder.parent.parent
    return folder


def outdated(reports: Reports, folder: Path) -> list[str]:
    """A sentence for each report that was made from another one than the one which is there now."""
    root = run_of(folder)
    return [
        f"{stage}.yaml was made from another {name} than the one that is here now: its numbers are of that one"
        for stage, report in reports.items()
        for name, sha256 in report["inputs"].items()
        if name.removesuffix(".yaml") in STAGES and (root / name).exists() and sha256_of(root / name) != sha256
    ]


def beside(folder: Path) -> list[Path]:
    reports = [*folder.glob("evaluations/*/evaluate.yaml"), *folder.glob("measurements/*/measure.yaml")]
    return sorted(report.parent for report in reports)


def results_of(reports: Reports, stage: str) -> dict[str, Any]:
    """What a stage found; nothing where it has no report."""
    return reports[stage]["results"] if stage in reports else {}  # type: ignore[no-any-return]


def code_not_seen(reports: Reports) -> str:
    """The modules of such code, as calibrate found them."""
    return ", ".join(results_of(reports, "calibrate").get("code_not_seen", ()))


def headline(reports: Reports) -> str:
    model = results_of(reports, "fetch").get("model", {"name": "a model", "dataset": "unknown data"})
    if "evaluate" not in reports:
        return f"{model['name']}, {model['dataset']}: {'measured' if 'measure' in reports else 'not evaluated yet'}"
    settings, results = reports["evaluate"]["config"]["settings"], reports["evaluate"]["results"]
    dataset = reports["calibrate"]["config"]["settings"].get("dataset") if "calibrate" in reports else None
    eps = results.get("eps", settings["eps"])
    operator = results.get("operator", f"alpha {results['alpha']:g}")
    return (
        f"{model['name']}, {dataset or model['dataset']}, {settings['norm']} {eps}, {operator}, "
        f"{results['n_examples']:,} {settings.get('split', 'test')} images"
        + (f" (shard {settings['shard']})" if settings.get("shard") else "")
    )


def tables(reports: Reports, *, with_interval: bool = True) -> Iterator[Table]:
    """Every table there is something for, in reading order; the diagnostics are not among them."""
    if results := results_of(reports, "evaluate"):
        yield comparisons_table(results, with_interval=with_interval)
        if results.get("eps_curve"):
            yield eps_table(results)
        if results.get("distances"):
            yield distances_table(results)
        yield attacks_table(results)
    if "measure" in reports:
        yield measurement_table(reports["measure"]["results"])
    if (results := results_of(reports, "sweep-alpha")).get("curve"):
        yield sweep_table(results)


def verdict(reports: Reports) -> str:
    """``real gain. +2.00 ± 0.5 points ...``, or the word that there is none yet; empty for a measurement."""
    if results := results_of(reports, "evaluate"):
        return f"{results['verdict']}. {results['reason']}"
    return "" if "measure" in reports else "none: the run was not evaluated"


def provenance(reports: Reports) -> list[tuple[str, str]]:
    rows = []
    for stage, report in reports.items():
        made = report["provenance"]
        rows.append((stage, made["command"]))
        rows.append((f"{stage}, report", f"sha256 of its content {report['content_sha256']}, {made['finished']}"))
    last = reports[list(reports)[-1]]["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    rows += [("versions", versions), ("machine", machine_of(last))]
    if "evaluate" in reports:
        searched = results_of(reports, "evaluate").get("search", {}).get("precision", "fp32")
        rows.append(("seed", f"{reports['evaluate']['config']['settings']['seed']}"))
        rows.append(("precision of the search", f"{searched}; breaks judged in float32"))
    if code := code_not_seen(reports):
        rows.append((CODE_NOT_SEEN, code))
    weights = results_of(reports, "fetch").get("sha256")
    return [*rows, ("weights", f"sha256 {weights}")] if weights else rows
