"""``meansparse table N RUN...``: a table of the paper with our cells beside its own, as Markdown and YAML."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from ..errors import ConfigError
from ..files import write_bytes
from ..paper.page import summary_page, table_data, table_file, table_page
from ..paper.results import RunResults, read_results, without_machine_paths
from ..paper.tables import in_paper, paper_table
from ..reporting.console import note


def write_table(number: str, runs: Sequence[str], folder: Path, *, data_note: str | None = None) -> Path:
    """Write ``table<N>.md`` and ``.yaml`` from the reports of ``runs`` (RUN, or COLUMN=RUN); the page's path."""
    from ..paper.fill import fill_table
    from ..paper.subset import fill_subset_table

    if number == "summary":
        if data_note is not None:
            raise ConfigError("the summary has the data notes of its tables", hint="leave --data-note out")
        return write_summary(runs, folder)
    table = paper_table(number)
    page = table_file(folder, number).with_suffix(".md")
    if not runs and page.exists():
        raise ConfigError(
            f"no run was named, and {page} would lose its cells",
            hint=f"name run folders: meansparse table {number} RUN...; or write elsewhere: --output DIR",
        )
    named = [_named_run(text) for text in runs]
    command = shlex.join(["meansparse", *sys.argv[1:]])
    if table.by == "fraction":
        text, data = fill_subset_table(table, [run for _, run in named], command=command, data_note=data_note)
    else:
        filled = fill_table(table, named)
        text = table_page(filled, command=command, data_note=data_note)
        data = table_data(filled, command=command, data_note=data_note)
        n_run = sum(cell.result is not None for column in filled.columns for cell in column.cells)
        n_cells = sum(len(column.cells) for column in filled.columns)
        note(f"{in_paper(number)}: {n_run} of {n_cells} cells were run")
        for own, worst in filled.judgements:
            answers = own.answer if worst is None else f"{own.answer}; in the worst case {worst.answer}"
            note(f"  {own.claim.text}: {answers}")
    write_bytes(page, text.encode())
    as_yaml = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    header = "# written by `meansparse table`; accuracies are fractions\n"
    write_bytes(page.with_suffix(".yaml"), (header + as_yaml).encode())
    return page


def write_summary(runs: Sequence[str], folder: Path) -> Path:
    """Every claim of the paper on one page, ``README.md`` of ``folder``, from the tables that lie there."""
    if runs:
        raise ConfigError("the summary is made from tables, not from runs", hint="meansparse table summary -o DIR")
    page = folder / "README.md"
    command = without_machine_paths(shlex.join(["meansparse", *sys.argv[1:]]))
    write_bytes(page, summary_page(folder, command=command).encode())
    return page


def _named_run(text: str) -> tuple[str | None, RunResults]:
    column, equals, path = text.partition("=")
    if not equals or Path(text).is_dir():  # a folder's name may hold a "=" too
        column, path = "", text
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"no run folder {path}", hint="a run folder, or COLUMN=FOLDER")
    return column or None, read_results(folder)
