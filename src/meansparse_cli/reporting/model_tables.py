"""Tables of models: the zoo with its published figures, and its check; the sites of one, the epochs of its training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from ..stats.format import percent
from .table import Table
from .template import fill

if TYPE_CHECKING:
    from ..models.check import Row
    from ..models.published import PublishedModel
    from ..sites.find import Site
    from ..training.state import EpochResult

LAYOUTS = {"channels-first": "NCHW", "channels-last": "NHWC", "tokens": "NLC", "flat": "NC"}
EPOCHS_ON_SCREEN = 12
CHECKED: "dict[str, tuple[str, Callable[[Row], str]]]" = {
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
ROOM_FOR_ARCHITECTURES = 130
"""Columns from which on the architecture, which most names hold, is shown as well."""


def models_tables(models: "Sequence[PublishedModel]", *, width: int) -> Iterator[Table]:
    """A table a data set and threat, a row a model; accuracies in percent, a column for each kind that any has."""
    is_wide = width >= ROOM_FOR_ARCHITECTURES
    for dataset, threat in dict.fromkeys((m.dataset, m.threat) for m in models):
        group = [m for m in models if (m.dataset, m.threat) == (dataset, threat)]
        figures = {
            "clean %": [percent(m.clean_accuracy) for m in group],
            "AA %": [percent(m.autoattack_accuracy) + ("?" if m.unreliable else "") for m in group],
            "ext. %": [percent(m.external_accuracy) for m in group],
            "corr. %": [percent(m.corruptions_accuracy) for m in group],
        }
        columns = {
            "model": [m.name for m in group],
            **({"architecture": [m.architecture for m in group]} if is_wide else {}),
            "M par.": ["" if m.parameters is None else f"{m.parameters / 1e6:.1f}" for m in group],
            **{name: column for name, column in figures.items() if any(column)},
        }
        title = f"{dataset}, {threat}: {len(group)} model{'s' * (len(group) != 1)}"
        kinds = "ff" if is_wide else "f"
        yield Table.of(title, columns, kinds=kinds.ljust(len(columns), "n"))


def show_sites(sites: "Sequence[Site]", chosen_by: Mapping[int, str]) -> RenderableType:
    """For the terminal: all sites, those in use with the part of the rule that chose them, the others dim."""
    n_gates = sum(site.gate for site in sites)
    gates = f"; {n_gates} of the {len(sites)} are gates" if n_gates else ""
    rows = [
        (
            str(site.index),
            site.name,
            site.operation if site.kind == "module" else f"{site.operation}()",
            LAYOUTS[site.layout] if len(site.shape) < 4 else site.layout,
            str(site.channels),
            "gate" if site.gate else "addition" if site.after_addition else "main path" if site.main_path else "",
            chosen_by.get(site.index, "-"),
        )
        for site in sites
    ]
    header = ("#", "site", "activation", "layout", "ch", "place", "chosen by")
    unused = frozenset(i for i, site in enumerate(sites) if site.index not in chosen_by)
    title = f"{len(chosen_by)} of {len(sites)} sites chosen{gates}"
    return Table(title, header, rows, unused, kinds="nfttntf").to_rich(strong="dim")


def show_epochs(log: "Sequence[EpochResult]", best: int, selected_on: str) -> RenderableType:
    """The last epochs of a training run, the best one marked; ``selected_on`` names the split of the accuracies."""
    last = log[-EPOCHS_ON_SCREEN:]
    columns = {
        "epoch": [f"{row.epoch + 1}" for row in last],
        "loss": [f"{row.train_loss:.3f}" for row in last],
        f"{selected_on} clean %": [percent(row.selection_accuracy) for row in last],
        f"{selected_on} PGD-10 %": [percent(row.selection_robust_accuracy) for row in last],
        "seconds": [f"{row.seconds:.1f}" for row in last],
        "": ["best" if row.epoch == best else "" for row in last],
    }
    return Table.of("training", columns, kinds="nnnnnn").to_rich()


def checks_table(rows: "Sequence[Row]", title: str = "", *, left_out: "set[str]" = ON_THE_PAGE_ALONE) -> Table:
    """A row an entry, for the screen; those that failed stand out."""
    columns = {name: column for name, column in CHECKED.items() if name not in left_out}
    cells = [tuple(_cell(row, text) for _, text in columns.values()) for row in rows]
    failed = frozenset(i for i, row in enumerate(rows) if row["problems"])
    return Table(title, tuple(columns), cells, failed, "".join(kind for kind, _ in columns.values()))


def checks_markdown(rows: "Sequence[Row]", provenance: dict[str, Any], peak_rss_gib: float) -> str:
    """The same as a page, with what was checked and on what."""
    table = replace(checks_table(rows, left_out=set()), strong=frozenset())
    about: dict[str, Any] = {"summary": summary(rows), "made": provenance, "peak_rss_gib": peak_rss_gib}
    return fill(__package__, "zoo-check.md", table=table.to_markdown(), **about)


def summary(rows: "Sequence[Row]") -> str:
    n_passed = sum(not row["problems"] for row in rows)
    minutes = sum(row["seconds"] for row in rows) / 60
    return f"{n_passed} of {len(rows)} passed, {minutes:.1f} minutes one after the other"


def verdict_of(row: "Row") -> str:
    passed = f"passed ({', '.join(row['rewrites'])} put back before each pass)" if row.get("rewrites") else "passed"
    return "; ".join(row["problems"]) or passed


def _cell(row: "Row", text: "Callable[[Row], str]") -> str:
    try:
        return text(row)
    except KeyError:  # a row that failed early has not all of them
        return ""
