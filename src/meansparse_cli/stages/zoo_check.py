"""``models --check``: the check of the zoo's entries, whose report is written after each: a killed check goes on.

Shards and ranks have reports of their own, which the check of all of them takes over.
"""

import json
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from ..errors import ConfigError, ModelNotFound
from ..files import discard, write_bytes
from ..models.check import N_IMAGES, SEED, Row, check_entries
from ..models.names import ZooEntry
from ..models.published import PublishedModel
from ..models.zoo import zoo_entries
from ..reporting.console import console, live, note
from ..reporting.model_tables import checks_markdown, checks_table, summary, verdict_of
from ..runs.folder import run_folder_lock
from ..runs.report import read_report, versions, write_report
from ..settings.arguments import Models
from ..settings.shard import read_shard
from .workers import as_ranks, rank_here

STAGE = "zoo-check"
FOLDER = Path("runs/zoo-check")
SHARDS = "shards"
KEYS = ("name", "dataset", "threat")
ROWS_ON_SCREEN = 12


def check_models(models: Sequence[PublishedModel], given: Models) -> tuple[str, bool] | None:
    """Check the zoo's entries among ``models``; what stdout gets (a report's path, or JSON), and whether all passed.

    None on a rank of ``torchrun`` that is not the first: the ranks share the entries.
    """
    wanted = {ZooEntry(m.name, m.dataset, m.threat) for m in models}
    entries = [entry for entry in zoo_entries() if entry in wanted]
    if not entries:
        raise ModelNotFound("no entry of RobustBench's zoo fits these filters", hint="every name: meansparse models")
    folder, rank = given.run or FOLDER, rank_here()
    check, whole = (partial(_check, entries, folder, n_jobs=given.jobs, fresh=fresh) for fresh in (given.fresh, False))
    if rank is None:
        found = check(given.shard)
    elif given.shard is not None:
        raise ConfigError("--shard with torchrun, which deals out shards itself", hint="leave --shard out")
    elif (gathered := as_ranks(rank, check, partial(_begin, folder, given.fresh), partial(whole, None))) is not None:
        found = gathered
    else:
        return None
    path, rows = found
    console.print(checks_table(rows, summary(rows)).to_rich(strong="red"))
    failed = [row["name"] for row in rows if row["problems"]]
    if failed:
        note(f"failed: {', '.join(failed)}")
    return json.dumps(rows) if given.as_json else str(path), not failed


def _begin(folder: Path, fresh: bool) -> None:
    """Throw away what was found before, if asked for, before ranks begin."""
    with run_folder_lock(folder):
        for file in (folder / f"{STAGE}.yaml", *_of_shards(folder)) if fresh else ():
            file.unlink(missing_ok=True)


def _check(
    entries: Sequence[ZooEntry], folder: Path, shard: str | None, *, n_jobs: int, fresh: bool = False
) -> tuple[Path, list[Row]]:
    """All of it, or a shard, which has a folder of its own and leaves out what others know to pass."""
    if shard is None:
        with run_folder_lock(folder):
            return check_zoo(entries, folder, fresh=fresh, n_jobs=n_jobs)
    part = read_shard(shard)
    place, own = folder / SHARDS / part.name, [entries[i] for i in part.positions(len(entries))]
    with run_folder_lock(folder, shared=True), run_folder_lock(place):
        others = [] if fresh else [folder / f"{STAGE}.yaml", *_of_shards(folder)]
        known = {key for file in others if file.parent != place for key in _passed_before(file)[0]}
        return check_zoo([entry for entry in own if _key(entry) not in known], place, fresh=fresh, n_jobs=n_jobs)


def check_zoo(
    entries: Sequence[ZooEntry], folder: Path, *, fresh: bool = False, n_jobs: int = 1
) -> tuple[Path, list[Row]]:
    """Check ``entries``, ``n_jobs`` at a time; the path of ``zoo-check.yaml`` in ``folder``, and their rows.

    What shards in it have found is taken over.
    """
    path = folder / f"{STAGE}.yaml"
    rows, peak, seconds = ({}, 0.0, 0.0) if fresh else _passed_before(path)
    for file in [] if fresh else _of_shards(folder):
        theirs, peak_there, seconds_there = _found_before(file)
        rows, peak, seconds = rows | theirs, max(peak, peak_there), seconds + seconds_there
    _write(path, rows.values(), seconds, peak)
    discard(folder / SHARDS)
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


def _of_shards(folder: Path) -> list[Path]:
    """Their reports, the latest one last."""
    return sorted(folder.glob(f"{SHARDS}/*/{STAGE}.yaml"), key=lambda file: file.stat().st_mtime)


def _key(row: Row | ZooEntry) -> tuple[str, ...]:
    return tuple(row[key] if isinstance(row, dict) else getattr(row, key) for key in KEYS)


def _passed_before(path: Path) -> tuple[dict[tuple[str, ...], Row], float, float]:
    """Rows of an earlier check that need not be done again, its peak memory and its wall time."""
    rows, peak, seconds = _found_before(path)
    return {key: row for key, row in rows.items() if not row["problems"]}, peak, seconds


def _found_before(path: Path) -> tuple[dict[tuple[str, ...], Row], float, float]:
    """Every row of an earlier check, by these versions."""
    if not path.exists():
        return {}, 0.0, 0.0
    report = read_report(path, STAGE, mend="meansparse models --check")
    if report["provenance"]["versions"] != versions():
        note(f"{path} was made with other versions; checking anew")
        return {}, 0.0, 0.0
    rows = {_key(row): row for row in report["results"]["models"]}
    return rows, report["results"]["peak_rss_gib"], report["provenance"]["seconds"]


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
