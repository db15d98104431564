"""The reports of a run, read for people, and what a page about it says in whatever form: headline, tables, verdict."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..files import sha256_of
from ..runs.report import STAGES, RunPaths, machine_of, read_report, stage_command
from .evaluation_tables import attacks_table, comparisons_table, eps_table
from .sweep_tables import measurement_table, sweep_table
from .table import Table

Reports = dict[str, dict[str, Any]]


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
    """The command that writes the report of ``stage`` in ``place``."""
    shard = None
    if place.parent.name == "shards":
        shard, place = place.name.removeprefix("shard-").replace("-of-", "/"), place.parent.parent
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
    """The named evaluations and the measurements of a run."""
    reports = [*folder.glob("evaluations/*/evaluate.yaml"), *folder.glob("measurements/*/measure.yaml")]
    return sorted(report.parent for report in reports)


def results_of(reports: Reports, stage: str) -> dict[str, Any]:
    """What a stage found; nothing where it has no report."""
    return reports[stage]["results"] if stage in reports else {}  # type: ignore[no-any-return]


def headline(reports: Reports) -> str:
    """What the numbers are about, in one line."""
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
        searched = results_of(reports, "evaluate").get("search", {}).get("precision", "fp32")
        rows.append(("seed", f"{reports['evaluate']['config']['settings']['seed']}"))
        rows.append(("precision of the search", f"{searched}; breaks judged in float32"))
    weights = results_of(reports, "fetch").get("sha256")
    return [*rows, ("weights", f"sha256 {weights}")] if weights else rows
