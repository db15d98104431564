"""What a page about a run says, in whatever form: headline, tables, verdict, and what made the numbers."""

from collections.abc import Iterator
from typing import Any

from ..runs.report import machine_of
from .evaluation_tables import attacks_table, comparisons_table, eps_table
from .reports import Reports
from .sweep_tables import measurement_table, sweep_table
from .table import Table


def headline(reports: Reports) -> str:
    """What the numbers are about, in one line."""
    model = _model(reports)
    if "evaluate" not in reports:
        return f"{model['name']}, {model['dataset']}: {'measured' if 'measure' in reports else 'not evaluated yet'}"
    report = reports["evaluate"]
    settings, results = report["config"]["settings"], report["results"]
    eps = results.get("eps", settings["eps"])
    operator = results.get("operator", f"alpha {results['alpha']:g}")
    return (
        f"{model['name']}, {_data_of(reports)}, {settings['norm']} {eps}, {operator}, "
        f"{results['n_examples']:,} {settings.get('split', 'test')} images"
        + (f" (shard {settings['shard']})" if settings.get("shard") else "")
    )


def tables(reports: Reports, *, with_interval: bool = True) -> Iterator[Table]:
    """Every table there is something for, in reading order; the diagnostics are not among them."""
    if "evaluate" in reports:
        results = reports["evaluate"]["results"]
        yield comparisons_table(results, with_interval=with_interval)
        if results.get("eps_curve"):
            yield eps_table(results)
        yield attacks_table(results)
    if "measure" in reports:
        yield measurement_table(reports["measure"]["results"])
    if "sweep-alpha" in reports and reports["sweep-alpha"]["results"].get("curve"):
        yield sweep_table(reports["sweep-alpha"]["results"])


def verdict(reports: Reports) -> str:
    """``real gain. +2.00 ± 0.5 points ...``, or the word that there is none yet; empty for a measurement."""
    if "measure" in reports and "evaluate" not in reports:
        return ""
    if "evaluate" not in reports:
        return "none: the run was not evaluated"
    results = reports["evaluate"]["results"]
    return f"{results['verdict']}. {results['reason']}"


def provenance(reports: Reports) -> list[tuple[str, str]]:
    """What made each number: commands, versions, device, hashes."""
    rows = []
    for stage, report in reports.items():
        made = report["provenance"]
        rows.append((stage, made["command"]))
        rows.append((f"{stage}, report", f"sha256 of its content {report['content_sha256']}, {made['finished']}"))
    last = reports[list(reports)[-1]]["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    rows += [("versions", versions), ("machine", machine_of(last))]
    if "evaluate" in reports:
        settings = reports["evaluate"]["config"]["settings"]
        rows.append(("seed", str(settings["seed"])))
        searched = reports["evaluate"]["results"].get("search", {}).get("precision", "fp32")
        rows.append(("precision of the search", f"{searched}; breaks judged in float32"))
    weights = reports.get("fetch", {}).get("results", {}).get("sha256")
    return [*rows, ("weights", f"sha256 {weights}")] if weights else rows


def _model(reports: Reports) -> dict[str, Any]:
    unknown = {"name": "a model", "dataset": "unknown data"}
    return reports.get("fetch", {}).get("results", {}).get("model", unknown)  # type: ignore[no-any-return]


def _data_of(reports: Reports) -> str:
    given = reports.get("calibrate", {}).get("config", {}).get("settings", {}).get("dataset")
    return str(given or _model(reports)["dataset"])
