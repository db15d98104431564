"""``models --check``: the check of the zoo's entries, whose report is written after each: a killed check goes on."""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import ModelNotFound
from ..files import write_bytes
from ..models.check import N_IMAGES, SEED, Row, check_entries
from ..models.names import ZooEntry
from ..models.published import PublishedModel
from ..models.zoo import zoo_entries
from ..reporting.console import console, live, note
from ..reporting.model_tables import checks_markdown, checks_table, summary, verdict_of
from ..runs.folder import run_folder_lock
from ..runs.report import read_report, versions, write_report

STAGE = "zoo-check"
FOLDER = Path("runs/zoo-check")
KEYS = ("name", "dataset", "threat")
ROWS_ON_SCREEN = 12


def check_models(
    models: Sequence[PublishedModel], folder: Path | None, *, fresh: bool, as_json: bool, n_jobs: int
) -> tuple[str, bool]:
    """Check the zoo's entries among ``models``; what stdout gets (a report's path, or JSON), and whether all passed."""
    wanted = {ZooEntry(m.name, m.dataset, m.threat) for m in models}
    entries = [entry for entry in zoo_entries() if entry in wanted]
    if not entries:
        raise ModelNotFound("no entry of RobustBench's zoo fits these filters", hint="every name: meansparse models")
    folder = folder or FOLDER
    with run_folder_lock(folder):
        path, rows = check_zoo(entries, folder, fresh=fresh, n_jobs=n_jobs)
    console.print(checks_table(rows, summary(rows)).to_rich(strong="red"))
    failed = [row["name"] for row in rows if row["problems"]]
    if failed:
        note(f"failed: {', '.join(failed)}")
    return json.dumps(rows) if as_json else str(path), not failed


def check_zoo(
    entries: Sequence[ZooEntry], folder: Path, *, fresh: bool = False, n_jobs: int = 1
) -> tuple[Path, list[Row]]:
    """Check ``entries``, ``n_jobs`` at a time; the path of ``zoo-check.yaml`` in ``folder``, and their rows."""
    path = folder / f"{STAGE}.yaml"
    rows, peak, seconds = ({}, 0.0, 0.0) if fresh else _passed_before(path)
    started = time.monotonic()
    wanted = {_key(entry): entry for entry in entries}
    todo = [entry for key, entry in wanted.items() if key not in rows]
    if len(todo) < len(wanted):
        note(f"{len(wanted) - len(todo)} of {len(wanted)} passed before ({path}); --fresh checks them again")
    with live("models") as view:
        view.begin("checking", len(wanted), len(wanted) - len(todo))
        for row, peak_now in check_entries(todo, n_jobs):
            rows[_key(row)], peak = row, max(peak, peak_now)
            _write(path, rows.values(), seconds + time.monotonic() - started, peak)
            view.advance(1)
            shown = [r for k, r in rows.items() if k in wanted][-ROWS_ON_SCREEN:]
            view.show(checks_table(shown).to_rich(strong="red"))
            if view.display is None:
                note(f"{row['name']} ({row['dataset']}, {row['threat']}): {verdict_of(row)}, {row['seconds']} s")
    return path, [rows[key] for key in wanted]


def _key(row: Row | ZooEntry) -> tuple[str, ...]:
    return tuple(row[key] if isinstance(row, dict) else getattr(row, key) for key in KEYS)


def _passed_before(path: Path) -> tuple[dict[tuple[str, ...], Row], float, float]:
    """Rows of an earlier check that need not be done again, its peak memory and its wall time."""
    if not path.exists():
        return {}, 0.0, 0.0
    report = read_report(path, STAGE, mend="meansparse models --check")
    if report["provenance"]["versions"] != versions():
        note(f"{path} was made with other versions; checking anew")
        return {}, 0.0, 0.0
    passed = {_key(row): row for row in report["results"]["models"] if not row["problems"]}
    return passed, report["results"]["peak_rss_gib"], report["provenance"]["seconds"]


def _write(path: Path, rows: Iterable[Row], seconds: float, peak: float) -> None:
    order = [_key(entry) for entry in zoo_entries()]
    rows = sorted(rows, key=lambda row: order.index(_key(row)))
    report = write_report(
        path,
        stage=STAGE,
        config={"seed": SEED, "n_images": N_IMAGES},
        results={
            "n_models": len(rows),
            "n_passed": sum(not row["problems"] for row in rows),
            "peak_rss_gib": round(peak, 2),
            "models": rows,
        },
        seconds=seconds,
    )
    write_bytes(path.with_suffix(".md"), checks_markdown(rows, report["provenance"], peak).encode())
