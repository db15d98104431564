"""What people see of the zoo check: its table on the screen, and its page."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .table import Table
from .template import environment

if TYPE_CHECKING:
    from ..models.check import Row

COLUMNS: "dict[str, tuple[str, Callable[[Row], str]]]" = {
    "model": ("t", lambda row: row["name"]),
    "data set": ("f", lambda row: row["dataset"]),
    "threat": ("f", lambda row: row["threat"]),
    "M parameters": ("n", lambda row: f"{row['parameters'] / 1e6:.1f}"),
    "sites": ("n", lambda row: f"{row['n_sites']}"),
    "gates": ("n", lambda row: f"{row['n_gates']}"),
    "axis confirmed": ("n", lambda row: f"{row['n_confirmed']}"),
    "activations": ("f", lambda row: ", ".join(f"{k} {v}" for k, v in row["operations"].items())),
    "layouts": ("f", lambda row: ", ".join(row["layouts"])),
    "s": ("n", lambda row: f"{row['seconds']:.1f}"),
    "result": ("f", lambda row: verdict_of(row)),
}
"""Heading -> what kind of column it is, as in ``Table``, and the cell of a row."""
ON_THE_PAGE_ALONE = {"axis confirmed", "activations", "layouts"}


def checks_table(rows: "Sequence[Row]", title: str = "", *, left_out: "set[str]" = ON_THE_PAGE_ALONE) -> Table:
    """A row an entry, for the screen; those that failed stand out."""
    columns = {name: column for name, column in COLUMNS.items() if name not in left_out}
    cells = [tuple(_cell(row, text) for _, text in columns.values()) for row in rows]
    failed = frozenset(i for i, row in enumerate(rows) if row["problems"])
    return Table(title, tuple(columns), cells, failed, "".join(kind for kind, _ in columns.values()))


def checks_markdown(rows: "Sequence[Row]", provenance: dict[str, Any], peak_rss_gib: float) -> str:
    """The same as a page, with what was checked and on what."""
    table = replace(checks_table(rows, left_out=set()), strong=frozenset())
    page = environment(__package__).get_template("zoo-check.md")
    return page.render(summary=summary(rows), made=provenance, peak_rss_gib=peak_rss_gib, table=table.to_markdown())


def summary(rows: "Sequence[Row]") -> str:
    """How many passed, how long it took."""
    n_passed = sum(not row["problems"] for row in rows)
    minutes = sum(row["seconds"] for row in rows) / 60
    return f"{n_passed} of {len(rows)} passed, {minutes:.1f} minutes one after the other"


def verdict_of(row: "Row") -> str:
    """What was wrong with an entry, or that it passed."""
    passed = f"passed ({', '.join(row['rewrites'])} put back before each pass)" if row.get("rewrites") else "passed"
    return "; ".join(row["problems"]) or passed


def _cell(row: "Row", text: "Callable[[Row], str]") -> str:
    try:
        return text(row)
    except KeyError:  # a row that failed early has not all of them
        return ""
