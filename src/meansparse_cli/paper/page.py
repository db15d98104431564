"""Pages, by ``templates/``: a filled table, which is data (YAML) as well, and what became of the paper's claims.

The summary of the claims reads the ``tableN.yaml`` that ``meansparse table N`` wrote, so it says what they say and
nothing else. It is the ``README.md`` of their folder.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..errors import ArtifactError, ConfigError
from ..foreign import read_yaml
from ..reporting.template import fill
from .claims import RULE, Answer, Judgement, claims_data
from .fill import FilledTable
from .results import Result, RunResults, without_machine_paths
from .tables import in_paper, paper_table, table_names

ANSWERS: tuple[Answer, ...] = get_args(Answer)
MEASURES = ("under the paper's attack", "clean accuracy", "in the worst case, BPDA included")


def render(template: str, **context: Any) -> str:
    return fill(__package__, template, rule=RULE, **context)


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


@dataclass(frozen=True)
class SummaryRow:
    """A claim of table ``number``, whose ``page`` lies beside this one, and what became of it."""

    number: str
    page: str
    own: Judgement
    worst: Judgement | None

    @property
    def measures(self) -> list[tuple[str, Judgement]]:
        own = (MEASURES[self.own.claim.measure == "clean"], self.own)
        return [own] if self.worst is None else [own, (MEASURES[2], self.worst)]


def table_file(folder: Path, number: str) -> Path:
    """Where ``meansparse table`` writes a table as YAML; the page lies beside it as ``.md``."""
    return folder / (f"table{number}.yaml" if number.isdecimal() else f"{number}.yaml")


def summary_page(folder: Path, *, command: str) -> str:
    """The page, as Markdown. Raises ConfigError where there is no table, ArtifactError for a file that is none."""
    there = {n: _read(file) for n in table_names() if (file := table_file(folder, n)).exists()}
    if not there:
        raise ConfigError(f"no table lies in {folder}", hint="meansparse table 3 RUN writes one; make table3")
    rows = [row for number, content in there.items() for row in _rows(number, content, table_file(folder, number))]
    judged = [row for row in rows if any(found.answer != "not run" for _, found in row.measures)]
    # apart from the rest, as some claims are of a loss, and of those it is no good news that they hold
    gains = [row for row in judged if row.worst is not None and paper_table(row.number).is_of_a_gain(row.own.claim)]
    models = [found for content in there.values() for found in [*content.get("columns", {}).values(), content]]
    return render(
        "summary.md",
        command=command,
        data=sorted({content["data"] for content in there.values() if content.get("data")}),
        others=sorted({m["model"] for m in models if m.get("model") and not m["is_the_papers_model"]}),
        answers=ANSWERS,
        counts={
            name: Counter(found.answer for row in rows for m, found in row.measures if m == name) for name in MEASURES
        },
        gains=gains,
        own=Counter(row.own.answer for row in gains),
        worst=Counter(row.worst.answer for row in gains if row.worst is not None),
        absent=[in_paper(number) for number in table_names() if number not in there],
        judged=judged,
        in_paper=in_paper,
        left_out=Counter(in_paper(row.number) for row in rows if row not in judged),
    )


def _read(file: Path) -> dict[str, Any]:
    content = read_yaml(file, ArtifactError, hint=(again := "write it again: meansparse table N RUN..."))
    if not isinstance(content, dict):
        raise ArtifactError(f"{file} is not a table", hint=again)
    return content


def _rows(number: str, content: dict[str, Any], file: Path) -> list[SummaryRow]:
    rows = []
    try:
        for claim, found in zip(paper_table(number).claims, content["claims"], strict=True):
            if found["text"] != claim.text:
                raise ValueError(found["text"])
            own = Judgement(claim, **found["under_its_attack"])
            worst = Judgement(claim, **found["worst_case"]) if "worst_case" in found else None
            rows.append(SummaryRow(number, file.with_suffix(".md").name, own, worst))
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{file} was written by another version", hint=f"write it again: meansparse table {number} RUN..."
        ) from error
    return rows
