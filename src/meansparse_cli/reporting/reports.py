"""The reports of a run folder, read for people; every hash is checked on reading."""

from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..files import sha256_of
from ..runs.report import STAGES, RunPaths, read_report, stage_command

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
