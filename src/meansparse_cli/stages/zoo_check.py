"""``meansparse models --check``: the check of the zoo's entries, with its report in YAML, as a page and on the screen.

The report is written after every entry, so a check that was killed goes on where it was; entries that passed are not
checked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..files import write_bytes
from ..reporting.console import live, note
from ..runs.report import read_report, versions, write_report

if TYPE_CHECKING:
    from ..models.check.entries import Row
    from ..models.names import ZooEntry

STAGE = "zoo-check"
KEYS = ("name", "dataset", "threat")
ROWS_ON_SCREEN = 12

EXPLANATION = """\
Each entry is built by robustbench with random weights (no download, no GPU), its running statistics are set from two
random images, and then: alpha = 0 gives bit-identical logits; every site, gates and the places of published MeanSparse
operators included, holds the mean and deviation of the tensor that reaches it; the channel axis agrees with autograd's
record of the layer before it ("axis confirmed": at so many sites there is one); alpha = 0.2 changes the logits; the
input gradient, plain and straight-through, is finite and not zero; taking the operators out restores logits, state
dict and hooks; a saved checkpoint gives the same logits."""


@dataclass(frozen=True)
class Column:
    """One column of the table: its heading, and the cell of a row; a row that failed early has not all of them."""

    name: str
    text: Callable[[Row], str]
    is_number: bool = False
    on_screen: bool = True

    def cell(self, row: Row) -> str:
        try:
            return self.text(row)
        except KeyError:
            return ""


COLUMNS = (
    Column("model", lambda row: row["name"]),
    Column("data set", lambda row: row["dataset"]),
    Column("threat", lambda row: row["threat"]),
    Column("M parameters", lambda row: f"{row['parameters'] / 1e6:.1f}", is_number=True),
    Column("sites", lambda row: str(row["n_sites"]), is_number=True),
    Column("gates", lambda row: str(row["n_gates"]), is_number=True),
    Column("axis confirmed", lambda row: str(row["n_confirmed"]), is_number=True, on_screen=False),
    Column("activations", lambda row: ", ".join(f"{k} {v}" for k, v in row["operations"].items()), on_screen=False),
    Column("layouts", lambda row: ", ".join(row["layouts"]), on_screen=False),
    Column("s", lambda row: f"{row['seconds']:.1f}", is_number=True),
    Column("", lambda row: _verdict(row)),
)


def check_zoo(
    entries: Sequence[ZooEntry], folder: Path, *, seed: int = 0, fresh: bool = False, n_jobs: int = 1
) -> tuple[Path, list[Row]]:
    """Check ``entries``, ``n_jobs`` at a time, and write ``zoo-check.yaml`` and ``zoo-check.md`` into ``folder``.

    Returns the YAML's path and the rows of ``entries``; a row's ``problems`` are empty where the entry passed.
    """
    from ..models.check.entries import check_entries

    path = folder / f"{STAGE}.yaml"
    rows, peak, seconds = ({}, 0.0, 0.0) if fresh else _passed_before(path)
    started = time.monotonic()
    wanted = {_key(entry): entry for entry in entries}
    todo = [entry for key, entry in wanted.items() if key not in rows]
    if len(todo) < len(wanted):
        note(f"{len(wanted) - len(todo)} of {len(wanted)} passed before ({path}); --fresh checks them again")
    with live("models") as view:
        view.begin("checking", len(wanted), len(wanted) - len(todo))
        for row, peak_now in check_entries(todo, seed, n_jobs):
            rows[_key(row)], peak = row, max(peak, peak_now)
            _write(path, rows.values(), seed, seconds + time.monotonic() - started, peak)
            view.advance(1)
            view.show(checks_table([r for k, r in rows.items() if k in wanted][-ROWS_ON_SCREEN:]))
            if view.display is None:
                note(f"{row['name']} ({row['dataset']}, {row['threat']}): {_verdict(row)}, {row['seconds']} s")
    return path, [rows[key] for key in wanted]


def checks_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """A row an entry, for the screen."""
    table = Table(title=title, title_justify="left")
    shown = [column for column in COLUMNS if column.on_screen]
    for column in shown:
        justify = "right" if column.is_number else "left"
        table.add_column(column.name, justify=justify, no_wrap=column.name == "model")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*(column.cell(row) for column in shown), style="red" if row["problems"] else None)
    return table


def checks_markdown(rows: Sequence[Row], provenance: dict[str, Any], peak_rss_gib: float) -> str:
    """The same as a page, with what was checked and on what."""
    minutes = provenance["seconds"] / 60
    made_with = ", ".join(f"{name} {provenance['versions'][name]}" for name in ("torch", "robustbench", "python"))
    lines = [
        "# MeanSparse on every model of the zoo",
        "",
        f"Written by `meansparse models --check`: {summary(rows)}, {minutes:.1f} on the clock, "
        f"{peak_rss_gib:.1f} GiB of memory at most ({made_with}; {provenance['platform']}).",
        "",
        f"Command: `{provenance['command']}`.",
        "",
        EXPLANATION,
        "",
        "| " + " | ".join(column.name or "result" for column in COLUMNS) + " |",
        "|" + "|".join("--:" if column.is_number else "---" for column in COLUMNS) + "|",
        *("| " + " | ".join(column.cell(row).replace("|", "/") for column in COLUMNS) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Row]) -> str:
    """How many passed, how long it took."""
    n_passed = sum(not row["problems"] for row in rows)
    minutes = sum(row["seconds"] for row in rows) / 60
    return f"{n_passed} of {len(rows)} passed, {minutes:.1f} minutes one after the other"


def _verdict(row: Row) -> str:
    passed = f"passed ({', '.join(row['rewrites'])} put back before each pass)" if row.get("rewrites") else "passed"
    return "; ".join(row["problems"]) or passed


def _key(row: Row | ZooEntry) -> tuple[str, ...]:
    return tuple(row[key] if isinstance(row, dict) else getattr(row, key) for key in KEYS)


def _passed_before(path: Path) -> tuple[dict[tuple[str, ...], Row], float, float]:
    """Rows of an earlier check that need not be done again, its peak memory and its wall time.

    None if the versions changed.
    """
    if not path.exists():
        return {}, 0.0, 0.0
    report = read_report(path, STAGE, mend="meansparse models --check")
    if report["provenance"]["versions"] != versions():
        note(f"{path} was made with other versions; checking anew")
        return {}, 0.0, 0.0
    passed = {_key(row): row for row in report["results"]["models"] if not row["problems"]}
    return passed, report["results"]["peak_rss_gib"], report["provenance"]["seconds"]


def _write(path: Path, rows: Iterable[Row], seed: int, seconds: float, peak: float) -> None:
    from ..models.check.entries import N_IMAGES
    from ..models.zoo import zoo_entries

    order = [_key(entry) for entry in zoo_entries()]
    rows = sorted(rows, key=lambda row: order.index(_key(row)))
    report = write_report(
        path,
        stage=STAGE,
        config={"seed": seed, "n_images": N_IMAGES},
        inputs={},
        outputs={},
        results={
            "n_models": len(rows),
            "n_passed": sum(not row["problems"] for row in rows),
            "peak_rss_gib": round(peak, 2),
            "models": rows,
        },
        device="cpu",
        seconds=seconds,
    )
    write_bytes(path.with_suffix(".md"), checks_markdown(rows, report["provenance"], peak).encode())
