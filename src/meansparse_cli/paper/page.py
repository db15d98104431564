"""A filled table as a page (Markdown, by ``templates/``) and as data (YAML)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader

from ..reporting.table import Table
from ..stats.format import in_points, percent
from ..stats.paired import Accuracy, PairedDifference
from .claims import RULE, in_words
from .fill import FilledCell, FilledColumn, FilledTable, fill_cell, paper_base
from .results import Result, RunResults, without_machine_paths
from .tables import in_paper


def render(template: str, **context: Any) -> str:
    """A page by one of the templates."""
    return _environment().get_template(template).render(context)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.globals |= {"RULE": RULE}
    environment.filters |= {
        "thousands": "{:,}".format,
        "percent": in_percent,
        "as_option": "`--sites {}`".format,
        "as_code": "`{}`".format,
    }
    return environment


def table_page(filled: FilledTable, *, command: str, data_note: str | None) -> str:
    """The page: what it is and is not, a table a column of the paper, the claims, the commands."""
    used = [column for column in filled.columns if column.run is not None]
    named = dict.fromkeys(result.machine for result in filled.results)
    shown = [a for column in used for c in column.cells for a in (c.ours.clean, c.ours.robust, c.ours.worst)]
    papers = {column.column.n_examples for column in used} - {None}
    return render(
        "table.md",
        name=in_paper(filled.table.number),
        table=filled.table,
        columns=filled.columns,
        used=used,
        data_note=data_note,
        stand_ins=sorted({f"`{column.run.model}`" for column in used if column.run is not None and column.stands_in}),
        reduced=sorted({n for column in used for n in column.n_examples if n < (column.column.n_examples or 0)}),
        full=sorted(n for n in papers if n),
        on_training_images=any(c.cell.where.get("split") == "calibration" for column in used for c in column.cells),
        machines=[name for name in named if not any(other != name and other.startswith(name) for other in named)],
        extremes=[a.n for a in shown if a is not None and a.fraction in (0, 1)],  # where the binomial error is 0
        rows_of=lambda column: _rows(filled, column).to_markdown(),
        claims=[
            in_words("Clean accuracy" if own.claim.measure == "clean" else "The paper's attack", own, worst)
            for own, worst in filled.judgements
        ],
        typed=typed([c.run for c in filled.columns if c.run is not None], filled.results, command),
    )


def table_data(filled: FilledTable, *, command: str, data_note: str | None) -> dict[str, Any]:
    """The same for programs: fractions, a list of cells a column."""
    table = filled.table
    columns = {
        column.column.name: {
            "model": None if column.run is None else column.run.model,
            "is_the_papers_model": column.run is not None and not column.stands_in,
            "paper_n_examples": column.column.n_examples,
            "cells": [cell.to_report() for cell in column.cells],
        }
        for column in filled.columns
    }
    claims = [
        {"text": own.claim.text, "measure": own.claim.measure, "under_its_attack": own.to_report()}
        | ({} if worst is None else {"worst_case": worst.to_report()})
        for own, worst in filled.judgements
    ]
    head = {"table": table.number, "title": table.title, "attack": table.attack, "paper": table.source}
    made = {"data": data_note, "command": without_machine_paths(command)}
    return head | made | {"columns": columns, "claims": claims, "rule": RULE}


def typed(runs: Sequence[RunResults], results: Sequence[Result], command: str) -> list[str]:
    """What prepared the runs, then what measured the cells, in the order it was finished; each command once."""
    prepared = [command for run in runs for command in run.commands]
    measured = [result.command for result in sorted(results, key=lambda result: result.finished)]
    return list(dict.fromkeys(without_machine_paths(c) for c in [*prepared, *measured, command]))


def _rows(filled: FilledTable, column: FilledColumn) -> Table:
    """A column of the paper, a row a cell; on top the base model, where the table has one that stands in no column."""
    has_clean = any(cell.cell.clean is not None for cell in column.cells)
    attack = [f"{column.column.attack}: paper", "ours", "ours - paper", "gain: paper", "gain: ours"]
    names = [filled.table.by, *(["clean: paper", "ours"] if has_clean else []), *attack]
    names += ["worst case", "worst case: gain", "images"]
    base = next((cell.result.base for cell in column.cells if cell.result is not None), None)
    extra = [fill_cell(cell, [] if base is None else [base]) for cell in filled.table.extra.values()]
    of_base = list(filled.table.extra.values())
    rows = [
        ("base" if cell.cell in of_base else cell.cell.row, *_row(filled, cell, has_clean))
        for cell in [*extra, *column.cells]
    ]
    return Table("", tuple(names), rows, kinds="t" * len(names))


def _row(filled: FilledTable, cell: FilledCell, has_clean: bool) -> list[str]:
    paper, ours = cell.cell, cell.ours
    base = paper_base(filled.table, paper)
    clean = [percent(paper.clean), in_percent(ours.clean)] if has_clean else []
    difference = (
        "" if ours.robust is None else in_points(ours.robust.fraction - paper.robust, ours.robust.standard_error)
    )
    return [
        *clean,
        percent(paper.robust),
        in_percent(ours.robust),
        difference,
        "" if base is None else in_points(paper.robust - base.robust),
        in_percent(ours.robust_gain),
        in_percent(ours.worst),
        in_percent(ours.worst_gain),
        "" if ours.robust is None else f"{ours.robust.n:,}",
    ]


def in_percent(number: Accuracy | PairedDifference | float | None) -> str:
    """With its standard error; a difference in points; empty for None."""
    if isinstance(number, Accuracy):
        return percent(number.fraction, number.standard_error)
    if isinstance(number, PairedDifference):
        return in_points(number.difference, number.standard_error)
    return percent(number)
