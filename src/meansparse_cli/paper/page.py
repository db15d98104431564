"""A filled table as a page (Markdown, by ``templates/``) and as data (YAML)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..reporting.template import environment
from .claims import RULE, claims_data
from .fill import FilledTable
from .results import Result, RunResults, without_machine_paths
from .tables import in_paper


def render(template: str, **context: Any) -> str:
    """A page by one of the templates."""
    made = environment(__package__)
    made.globals["RULE"] = RULE
    return made.get_template(template).render(context)


def table_page(filled: FilledTable, *, command: str, data_note: str | None) -> str:
    """The page: what it is and is not, a table a column of the paper, the claims, the commands."""
    used = [(column, column.run) for column in filled.columns if column.run is not None]
    cells = [cell for column, _ in used for cell in column.cells]
    named = dict.fromkeys(result.machine for result in filled.results)
    shown = [accuracy for cell in cells for accuracy in (cell.ours.clean, cell.ours.robust, cell.ours.worst)]
    return render(
        "table.md",
        name=in_paper(filled.table.number),
        table=filled.table,
        columns=filled.columns,
        used=used,
        data_note=data_note,
        stand_ins=sorted({run.model for column, run in used if column.stands_in}),
        reduced=sorted({n for column, _ in used for n in column.n_examples if n < (column.column.n_examples or 0)}),
        full=sorted({column.column.n_examples for column, _ in used if column.column.n_examples}),
        on_training_images=any(cell.cell.where.get("split") == "calibration" for cell in cells),
        machines=[name for name in named if not any(other != name and other.startswith(name) for other in named)],
        extremes=[a.n for a in shown if a is not None and a.fraction in (0, 1)],  # where the binomial error is 0
        judgements=filled.judgements,
        typed=typed([run for _, run in used], filled.results, command),
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
    head = {"table": table.number, "title": table.title, "attack": table.attack, "paper": table.source}
    made = {"data": data_note, "command": without_machine_paths(command)}
    claims = claims_data(filled.judgements, with_measure=True)
    return head | made | {"columns": columns, "claims": claims, "rule": RULE}


def typed(runs: Sequence[RunResults], results: Sequence[Result], command: str) -> list[str]:
    """What prepared the runs, then what measured the cells, in the order it was finished; each command once."""
    prepared = [command for run in runs for command in run.commands]
    measured = [result.command for result in sorted(results, key=lambda result: result.finished)]
    return list(dict.fromkeys(without_machine_paths(c) for c in [*prepared, *measured, command]))
