"""A table of the paper with our cells beside its own: which result stands in which cell, and what it says of the claims."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..stats.paired import Accuracy, PairedDifference, accuracy_of, paired_difference
from .claims import Judgement, judge
from .results import Outcomes, Result, RunResults
from .tables import Cell, Claim, Column, PaperTable


@dataclass(frozen=True)
class FilledCell:
    """A cell of the paper and the result of ours that stands beside it (None: not run).

    ``worst``: the worst case over everything that was run, BPDA among it. ``*_gain``: paired, over the base model of the
    same report.
    """

    cell: Cell
    result: Result | None
    clean: Accuracy | None = None
    robust: Accuracy | None = None
    worst: Accuracy | None = None
    robust_gain: PairedDifference | None = None
    worst_gain: PairedDifference | None = None

    def to_report(self) -> dict[str, Any]:
        """Plain values, fractions; only what there is."""
        ours: dict[str, Any] = {}
        for name in ("clean", "robust", "worst"):
            accuracy: Accuracy | None = getattr(self, name)
            if accuracy is not None:
                ours |= {
                    name: accuracy.fraction,
                    f"{name}_standard_error": accuracy.standard_error,
                    "n_examples": accuracy.n,
                }
        for name in ("robust_gain", "worst_gain"):
            gain: PairedDifference | None = getattr(self, name)
            if gain is not None:
                ours |= {name: gain.difference, f"{name}_standard_error": gain.standard_error}
        if self.robust is not None:
            ours["robust_minus_paper"] = self.robust.fraction - self.cell.robust
        paper = {"robust": self.cell.robust} | ({} if self.cell.clean is None else {"clean": self.cell.clean})
        return {"row": self.cell.row, "where": self.cell.where, "paper": paper, "ours": ours}


@dataclass(frozen=True)
class FilledColumn:
    """A column with the run that fills it (None: not run). ``stands_in``: that run is not the paper's model."""

    column: Column
    run: RunResults | None
    cells: tuple[FilledCell, ...]
    stands_in: bool

    @property
    def attacks(self) -> list[str]:
        """What the worst case of our cells is over, each once."""
        results = [cell.result for cell in self.cells if cell.result is not None and cell.result.worst is not None]
        return list(dict.fromkeys(attack for result in results for attack in result.attacks))

    @property
    def n_examples(self) -> list[int]:
        """How many examples are behind our cells, each number once."""
        return sorted({cell.robust.n for cell in self.cells if cell.robust is not None})


@dataclass(frozen=True)
class FilledTable:
    """``paper_base``: (column, row) -> the paper's cell of the base model that this one is compared with, where it has one.

    ``of_claims``: the results that the claims were judged on. ``judgements``: for each claim, under the paper's measure and in the worst case (None: a claim on clean accuracy)."""

    table: PaperTable
    columns: tuple[FilledColumn, ...]
    paper_base: dict[tuple[str, str], Cell]
    of_claims: tuple[Result, ...]
    judgements: tuple[tuple[Judgement, Judgement | None], ...]

    @property
    def results(self) -> list[Result]:
        """Everything that the page rests on, in its cells or in its claims."""
        in_cells = [cell.result for column in self.columns for cell in column.cells if cell.result is not None]
        return [*in_cells, *self.of_claims]


def fill_table(table: PaperTable, runs: Sequence[tuple[str | None, RunResults]]) -> FilledTable:
    """Put the results of ``runs``, (column or None, run), beside the paper's cells. Nothing is filled in that was not run.

    A run without a column goes to those that its model or training tells. Raises ConfigError where that is none.
    """
    of_column: dict[str, RunResults] = {}
    for name, run in runs:
        for column in [table.column(name)] if name is not None else columns_of_run(table, run):
            if column.name in of_column:
                raise ConfigError(
                    f"two runs for column {column.name}: {of_column[column.name].folder} and {run.folder}",
                    hint="give one of them",
                )
            of_column[column.name] = run
    columns = tuple(_fill_column(column, of_column.get(column.name)) for column in table.columns)
    filled = {column.column.name: column for column in columns}
    judgements, of_claims = [], list[Result]()
    for claim in table.claims:
        paper = sum(weight * _paper_value(table, place, claim.measure) for place, weight in claim.terms.items())
        stand_in = _stand_in(claim, filled)
        lookups = [
            _Outcomes(table, filled, claim.terms, measure)
            for measure in ([claim.measure, "worst"] if claim.measure == "robust" else [claim.measure])
        ]
        of_claims += [result for lookup in lookups for result in lookup.found.values() if result is not None]
        own, *worst = (replace(judge(claim, paper, lookup), stand_in=stand_in) for lookup in lookups)
        judgements.append((own, worst[0] if worst else None))
    return FilledTable(table, columns, _paper_bases(table), tuple(of_claims), tuple(judgements))


def _paper_bases(table: PaperTable) -> dict[tuple[str, str], Cell]:
    """For each cell at an alpha above 0 the one at alpha 0 of the same column, else of the same row, else of the table."""
    cells = [cell for column in table.columns for cell in column.cells]
    bases = [cell for cell in [*cells, *table.extra.values()] if _is_base(cell)]
    found: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        near = [b for b in bases if b.column == cell.column] + [b for b in bases if b.row == cell.row]
        if not _is_base(cell) and (chosen := next(iter([*near, *table.extra.values()]), None)) is not None:
            found[cell.column, cell.row] = chosen
    return found


def _stand_in(claim: Claim, filled: dict[str, FilledColumn]) -> str:
    """Our models in the columns of a claim that are of others, by name."""
    columns = [filled[name] for name, _ in claim.terms if name in filled]
    ours = {c.run.model for c in columns if c.run is not None and c.stands_in and c.column.model is not None}
    return ", ".join(sorted(ours))


def columns_of_run(table: PaperTable, run: RunResults) -> list[Column]:
    """The columns that a run can fill by itself: those of its zoo model, or of its training, or all of one model's table."""
    if table.column_is is not None:
        kind = run.training.get(table.column_is)
        found = [column for column in table.columns if column.name == kind]
    else:
        models = [column for column in table.columns if column.model is not None]
        found = [c for c in models if is_of(c, run)]
        if not models:
            found = list(table.columns)
    if not found:
        first = table.columns[0].name
        raise ConfigError(
            f"{run.folder}: {run.model} does not say which column of table {table.number} it is for",
            hint=f"say so: '{first}={run.folder}' (columns: {', '.join(c.name for c in table.columns)})",
        )
    return found


def is_of(column: Column, run: RunResults) -> bool:
    """Whether it is the column's own model: one name can stand for an Linf and an L2 model, so the threat decides as well."""
    source = run.source
    norm = column.cells[0].where.get("norm", source.threat)
    return (column.model, column.dataset, norm) == (source.name, source.dataset, source.threat)


def _fill_column(column: Column, run: RunResults | None) -> FilledColumn:
    results = () if run is None else in_order_of_use(column, run.results)
    cells = tuple(fill_cell(cell, results) for cell in column.cells)
    is_own = run is not None and is_of(column, run)
    return FilledColumn(column, run, cells, stands_in=run is not None and not is_own)


def fill_cell(cell: Cell, results: Sequence[Result]) -> FilledCell:
    """A cell of the paper with the first of ``results`` that serves it."""
    result = next((r for r in results if _serves(cell, r)), None)
    if result is None:
        return FilledCell(cell, None)
    robust = result.robust(cell.where)
    assert robust is not None
    base, worst = result.base, result.worst
    gains: dict[str, PairedDifference] = {}
    if base is not None:
        if (base_robust := base.robust(cell.where)) is not None:
            gains["robust_gain"] = paired_difference(robust, base_robust)
        if worst is not None and base.worst is not None:
            gains["worst_gain"] = paired_difference(worst, base.worst)
    return FilledCell(
        cell, result, accuracy_of(result.clean), accuracy_of(robust), None if worst is None else accuracy_of(worst), **gains
    )  # fmt: skip


def _serves(cell: Cell, result: Result) -> bool:
    return result.fits(cell.where) and result.robust(cell.where) is not None


def in_order_of_use(column: Column, results: Sequence[Result]) -> list[Result]:
    """The results that can stand in ``column``, those of the report first that fills most of its cells.

    Rows are compared with each other and the base model, so they come from one report where one has them all: on the same
    images, with the same pool. Among reports that fill as many, the one on most examples, then the youngest.
    """
    by_report: dict[Path, list[Result]] = {}
    for result in results:
        if any(_serves(cell, result) for cell in column.cells):
            by_report.setdefault(result.report, []).append(result)

    def worth(found: list[Result]) -> tuple[int, int, str]:
        n_filled = sum(any(_serves(cell, result) for result in found) for cell in column.cells)
        return n_filled, len(found[0].clean), found[0].finished

    return [result for found in sorted(by_report.values(), key=worth, reverse=True) for result in found]


def _paper_value(table: PaperTable, place: tuple[str, str], measure: str) -> float:
    cell = table.cell(*place)
    value = cell.clean if measure == "clean" else cell.robust
    assert value is not None
    return value


class _Outcomes:
    """Looks cells up for ``judge``; a base model is taken from the report that another cell of the same run is from."""

    def __init__(
        self, table: PaperTable, filled: dict[str, FilledColumn], places: Iterable[tuple[str, str]], measure: str
    ) -> None:
        self.table, self.measure = table, measure
        in_table = {(name, cell.cell.row): cell.result for name, column in filled.items() for cell in column.cells}
        cells = {place: table.cell(*place) for place in places}
        self.found = {place: in_table[cell.column, cell.row] for place, cell in cells.items() if not _is_base(cell)}
        runs = {name: column.run for name, column in filled.items()}
        for place, cell in cells.items():
            if _is_base(cell):
                near = [r for p, r in self.found.items() if cell.column not in runs or runs[p[0]] is runs[cell.column]]
                bases = [r.base for r in near if r is not None and r.base is not None]
                fitting = [base for base in bases if base.fits(cell.where)]
                self.found[place] = fitting[0] if fitting else in_table.get((cell.column, cell.row))
        if measure == "clean":
            self.found |= _most_images(filled, cells)

    def __call__(self, place: tuple[str, str]) -> tuple[NDArray[np.int64], Outcomes] | None:
        result = self.found[place]
        if result is None:
            return None
        outcomes = {"clean": result.clean, "worst": result.worst}.get(self.measure)
        if self.measure in ("robust", "attack"):
            outcomes = result.robust(self.table.cell(*place).where)
        return None if outcomes is None else (result.example, outcomes)


def _most_images(filled: dict[str, FilledColumn], cells: dict[tuple[str, str], Cell]) -> dict[tuple[str, str], Result]:
    """A result for each cell of a claim on clean accuracy, whichever the attack: those on most images that all of them have.

    From one report where one has them all, the youngest of several.
    """
    runs = {name: column.run for name, column in filled.items() if column.run is not None}
    by_place: dict[tuple[str, str], list[Result]] = {}
    for place, cell in cells.items():
        # a base model that stands in no column may be any run's; a column that was not run has no result
        candidates = [run for name, run in runs.items() if name == cell.column or cell.column not in filled]
        results = [r for run in candidates for r in run.results]
        by_place[place] = [result for result in results if result.fits(cell.where, clean=True)]
    sizes = set.intersection(*({len(r.clean) for r in found} for found in by_place.values()))
    if not sizes:
        return {}
    largest = {p: [r for r in found if len(r.clean) == max(sizes)] for p, found in by_place.items()}
    shared = set.intersection(*({r.report for r in found} for found in largest.values()))
    return {
        place: max((r for r in found if r.report in shared or not shared), key=lambda r: (r.finished, r.report))
        for place, found in largest.items()
    }


def _is_base(cell: Cell) -> bool:
    return float(cell.where.get("alpha", "1")) == 0
