"""``meansparse models --check``: every entry of the zoo built with random weights and put through ``model_check.py``.

Nothing is downloaded and no GPU is needed: the architectures come from the installed robustbench. The report is written
after every entry, so a check that was killed goes on where it was; entries that passed are not checked again.
"""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..files import write_bytes
from ..reporting.console import live, note
from ..runs.report import read_report, versions, write_report

if TYPE_CHECKING:
    from .zoo import ZooEntry

STAGE = "zoo-check"
N_IMAGES = 2
KEYS = ("name", "dataset", "threat")
ROWS_ON_SCREEN = 12
NUMBERS = ("M parameters", "sites", "gates", "axis confirmed", "s")
COLUMNS = ("model", "data set", "threat", *NUMBERS[:4], "activations", "layouts", "s", "")
NOT_ON_SCREEN = ("axis confirmed", "activations", "layouts")

EXPLANATION = (
    "Each entry is built by robustbench with random weights (no download, no GPU), its running statistics are set from two",
    "random images, and then: alpha = 0 gives bit-identical logits; every site, gates and the places of published MeanSparse",
    "operators included, holds the mean and deviation of the tensor that reaches it; the channel axis agrees with autograd's",
    'record of the layer before it ("axis confirmed": at so many sites there is one); alpha = 0.2 changes the logits; the',
    "input gradient, plain and straight-through, is finite and not zero; taking the operators out restores logits, state",
    "dict and hooks; a saved checkpoint gives the same logits.",
)


def check_zoo(
    entries: Sequence[ZooEntry], folder: Path, *, seed: int = 0, fresh: bool = False, n_jobs: int = 1
) -> tuple[Path, list[dict[str, Any]]]:
    """Check ``entries``, ``n_jobs`` at a time, and write ``zoo-check.yaml`` and ``zoo-check.md`` into ``folder``.

    Returns the YAML's path and the rows of ``entries``; a row's ``problems`` are empty where the entry passed.
    """
    path = folder / f"{STAGE}.yaml"
    rows, peak, seconds = ({}, 0.0, 0.0) if fresh else _passed_before(path)
    started = time.monotonic()
    wanted = {_key(entry): entry for entry in entries}
    todo = [entry for key, entry in wanted.items() if key not in rows]
    if len(todo) < len(wanted):
        note(f"{len(wanted) - len(todo)} of {len(wanted)} passed before ({path}); --fresh checks them again")
    with live("models") as view:
        view.begin("checking", len(wanted), len(wanted) - len(todo))
        for row, peak_now in _check_each(todo, seed, n_jobs):
            rows[_key(row)], peak = row, max(peak, peak_now)
            _write(path, rows.values(), seed, seconds + time.monotonic() - started, peak)
            view.advance(1)
            view.show(checks_table([r for k, r in rows.items() if k in wanted][-ROWS_ON_SCREEN:]))
            if view.display is None:
                note(f"{row['name']} ({row['dataset']}, {row['threat']}): {_verdict(row)}, {row['seconds']} s")
    return path, [rows[key] for key in wanted]


def _check_each(entries: Sequence[ZooEntry], seed: int, n_jobs: int) -> Iterator[tuple[dict[str, Any], float]]:
    """Rows as they are done, each with the peak memory so far in GiB: that of all processes, each at its own peak."""
    if n_jobs == 1:
        for entry in entries:
            yield check_entry(entry, seed=seed), _peak_rss_gib()
        return
    n_threads = max(1, (os.cpu_count() or 1) // n_jobs)
    peaks: dict[int, float] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_jobs, context, initializer=_share_cores, initargs=(n_threads,)) as workers:
        pending = [workers.submit(_check_in_worker, entry, seed) for entry in entries]
        try:
            for done in as_completed(pending):
                row, process, peak = done.result()
                peaks[process] = peak
                yield row, sum(peaks.values()) + _peak_rss_gib()
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def _share_cores(n_threads: int) -> None:
    import torch

    torch.set_num_threads(n_threads)


def _check_in_worker(entry: ZooEntry, seed: int) -> tuple[dict[str, Any], int, float]:
    return check_entry(entry, seed=seed), os.getpid(), _peak_rss_gib()


def _peak_rss_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def check_entry(entry: ZooEntry, *, seed: int = 0) -> dict[str, Any]:
    """One row of the report. Whatever goes wrong becomes one of the row's ``problems``."""
    import torch

    from ..data.datasets import KNOWN_DATASETS
    from .adopt import take_out
    from .model_check import check_model
    from .zoo import build_zoo_model

    started = time.monotonic()
    facts: dict[str, Any] = {}
    torch.manual_seed(seed)
    shape = KNOWN_DATASETS[entry.dataset].image_shape
    images = torch.rand((N_IMAGES, *shape), generator=torch.Generator().manual_seed(seed))
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("ignore")  # these, and what they print, are the architectures' own affair
        try:
            # as load_model builds it; no name holds the network, so that it can go before the next one comes
            facts, problems = check_model(
                take_out(build_zoo_model(entry)), images, Path(scratch) / "meansparse.safetensors"
            )
        except Exception as error:  # the architectures are other people's code
            problems = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"]
    gc.collect()
    identity = {key: getattr(entry, key) for key in KEYS}
    return identity | facts | {"problems": problems, "seconds": round(time.monotonic() - started, 1)}


def checks_table(rows: Sequence[dict[str, Any]], title: str | None = None) -> Table:
    """A row an entry, for the screen."""
    table = Table(title=title, title_justify="left")
    shown = [i for i, name in enumerate(COLUMNS) if name not in NOT_ON_SCREEN]
    for i in shown:
        table.add_column(
            COLUMNS[i], justify="right" if COLUMNS[i] in NUMBERS else "left", no_wrap=COLUMNS[i] == "model"
        )
    for row in rows:
        cells = _cells(row)
        table.add_row(*(cells[i] for i in shown), style="red" if row["problems"] else None)
    return table


def checks_markdown(rows: Sequence[dict[str, Any]], provenance: dict[str, Any], peak_rss_gib: float) -> str:
    """The same as a page, with what was checked and on what."""
    minutes = provenance["seconds"] / 60
    made_with = ", ".join(f"{name} {provenance['versions'][name]}" for name in ("torch", "robustbench", "python"))
    lines = [
        "# MeanSparse on every model of the zoo",
        "",
        f"Written by `meansparse models --check`: {summary(rows)}, {minutes:.1f} on the clock, {peak_rss_gib:.1f} GiB of memory at most "
        f"({made_with}; {provenance['platform']}).",
        "",
        f"Command: `{provenance['command']}`.",
        "",
        *EXPLANATION,
        "",
        "| " + " | ".join(name or "result" for name in COLUMNS) + " |",
        "|" + "|".join("--:" if name in NUMBERS else "---" for name in COLUMNS) + "|",
        *("| " + " | ".join(cell.replace("|", "/") for cell in _cells(row)) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """How many passed, how long it took."""
    n_passed = sum(not row["problems"] for row in rows)
    return (
        f"{n_passed} of {len(rows)} passed, {sum(row['seconds'] for row in rows) / 60:.1f} minutes one after the other"
    )


def _cells(row: dict[str, Any]) -> list[str]:
    if "n_sites" not in row:  # it failed before anything was found
        return [
            row["name"],
            row["dataset"],
            row["threat"],
            "",
            "",
            "",
            "",
            "",
            "",
            f"{row['seconds']:.1f}",
            _verdict(row),
        ]
    return [
        row["name"], row["dataset"], row["threat"], f"{row['parameters'] / 1e6:.1f}", str(row["n_sites"]),
        str(row["n_gates"]), str(row["n_confirmed"]), ", ".join(f"{k} {v}" for k, v in row["operations"].items()),
        ", ".join(row["layouts"]), f"{row['seconds']:.1f}", _verdict(row),
    ]  # fmt: skip


def _verdict(row: dict[str, Any]) -> str:
    passed = f"passed ({', '.join(row['rewrites'])} put back before each pass)" if row.get("rewrites") else "passed"
    return "; ".join(row["problems"]) or passed


def _key(row: Any) -> tuple[str, ...]:
    return tuple(row[key] if isinstance(row, dict) else getattr(row, key) for key in KEYS)


def _passed_before(path: Path) -> tuple[dict[tuple[str, ...], dict[str, Any]], float, float]:
    """Rows of an earlier check that need not be done again, its peak memory and its wall time; none if the versions changed."""
    if not path.exists():
        return {}, 0.0, 0.0
    report = read_report(path, STAGE, mend="meansparse models --check")
    if report["provenance"]["versions"] != versions():
        note(f"{path} was made with other versions; checking anew")
        return {}, 0.0, 0.0
    passed = {_key(row): row for row in report["results"]["models"] if not row["problems"]}
    return passed, report["results"]["peak_rss_gib"], report["provenance"]["seconds"]


def _write(path: Path, rows: Iterable[dict[str, Any]], seed: int, seconds: float, peak: float) -> None:
    from .zoo import zoo_entries

    order = [_key(entry) for entry in zoo_entries()]
    rows = sorted(rows, key=lambda row: order.index(_key(row)))
    report = write_report(
        path, stage=STAGE, config={"seed": seed, "n_images": N_IMAGES}, inputs={}, outputs={}, device="cpu", seconds=seconds,
        results={"n_models": len(rows), "n_passed": sum(not r["problems"] for r in rows), "peak_rss_gib": round(peak, 2), "models": rows},
    )  # fmt: skip
    write_bytes(path.with_suffix(".md"), checks_markdown(rows, report["provenance"], peak).encode())
