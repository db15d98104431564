"""What people see of the zoo check: its table on the screen, and its page."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .table import Table

if TYPE_CHECKING:
    from ..models.check import Row

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
    text: "Callable[[Row], str]"
    is_number: bool = False
    on_screen: bool = True

    def cell(self, row: "Row") -> str:
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
    Column("", lambda row: verdict_of(row)),
)


def checks_table(rows: "Sequence[Row]", title: str = "") -> Table:
    """A row an entry, for the screen; those that failed stand out."""
    columns = [column for column in COLUMNS if column.on_screen]
    kinds = "".join("n" if column.is_number else "t" if column.name == "model" else "f" for column in columns)
    failed = frozenset(i for i, row in enumerate(rows) if row["problems"])
    cells = [tuple(column.cell(row) for column in columns) for row in rows]
    return Table(title, tuple(column.name for column in columns), cells, failed, kinds)


def checks_markdown(rows: "Sequence[Row]", provenance: dict[str, Any], peak_rss_gib: float) -> str:
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


def summary(rows: "Sequence[Row]") -> str:
    """How many passed, how long it took."""
    n_passed = sum(not row["problems"] for row in rows)
    minutes = sum(row["seconds"] for row in rows) / 60
    return f"{n_passed} of {len(rows)} passed, {minutes:.1f} minutes one after the other"


def verdict_of(row: "Row") -> str:
    """What was wrong with an entry, or that it passed."""
    passed = f"passed ({', '.join(row['rewrites'])} put back before each pass)" if row.get("rewrites") else "passed"
    return "; ".join(row["problems"]) or passed
