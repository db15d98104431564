"""A table of the paper with our cells beside its own: which result stands in which, and what it says of the claims."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..stats.paired import Accuracy, PairedDifference, accuracy_of, paired_difference
from .claims import Judged, Judgement, judge
from .results import Result, RunResults
from .tables import Cell, Claim, Column, PaperTable, Place


@dataclass(frozen=True)
class Numbers:
    """What a result says: accuracies, and gains over another one, paired; None where that is not known.

    ``worst``: the worst case over everything that was run, BPDA among it.
    """

    clean: Accuracy | None = None
    robust: Accuracy | None = None
    worst: Accuracy | None = None
    robust_gain: PairedDifference | None = None
    worst_gain: PairedDifference | None = None

    @classmethod
    def of(cls, result: Result, where: dict[str, str], reference: Result | None) -> "Numbers":
        """Under the attack of ``where``; gains over ``reference``, on the same examples."""
        curves, others = ((r.robust(where), r.worst) if r is not None else (None, None) for r in (result, reference))
        robust, worst = (None if curve is None else accuracy_of(curve) for curve in curves)
        robust_gain, worst_gain = (
            None if mine is None or theirs is None else paired_difference(mine, theirs)
            for mine, theirs in zip(curves, others, strict=True)
        )
        return cls(accuracy_of(result.clean), robust, worst, robust_gain, worst_gain)

    def to_report(self) -> dict[str, Any]:
        ours: dict[str, Any] = {}
        for name, number in vars(self).items():
            if isinstance(number, Accuracy):
                error = {f"{name}_standard_error": number.standard_error}
                ours |= {name: number.fraction} | error | {"n_examples": number.n}
            elif number is not None:
                ours |= {name: number.difference, f"{name}_standard_error": number.standard_error}
        return ours


@dataclass(frozen=True)
class FilledCell:
    """A cell of the paper and our result beside it (None: not run), with gains over the base model of its report."""

    cell: Cell
    result: Result | None
    ours: Numbers

    def to_report(self) -> dict[str, Any]:
        ours = self.ours.to_report()
        if self.ours.robust is not None:
            ours["robust_minus_paper"] = self.ours.robust.fraction - self.cell.robust
        paper = {"robust": self.cell.robust} | ({} if self.cell.clean is None else {"clean": self.cell.clean})
        return {"row": self.cell.row, "where": self.cell.where, "paper": paper, "ours": ours}


@dataclass(frozen=True)
class FilledColumn:
    """A column with the run that fills it (None: not run). ``stands_in``: that run is not the paper's model."""

    column: Column
    run: RunResults | None
    cells: tuple[FilledCell, ...]

    @property
    def stands_in(self) -> bool:
        return self.run is not None and not is_of(self.column, self.run)

    def with_base(self, table: PaperTable) -> list[FilledCell]:
        """The cells, above them ours of the base model of ``table``, where that stands in no column."""
        base = next((cell.result.base for cell in self.cells if cell.result is not None), None)
        extra = [] if table.base is None else [fill_cell(table.base, [] if base is None else [base])]
        return [*extra, *self.cells]

    @property
    def attacks(self) -> list[str]:
        """What the worst case of our cells is over, each once."""
        results = [cell.result for cell in self.cells if cell.result is not None and cell.result.worst is not None]
        return list(dict.fromkeys(attack for result in results for attack in result.attacks))

    @property
    def n_examples(self) -> list[int]:
        """How many examples are behind our cells, each number once."""
        return sorted({cell.ours.robust.n for cell in self.cells if cell.ours.robust is not None})


@dataclass(frozen=True)
class FilledTable:
    """``of_claims``: the results that the claims were judged on."""

    table: PaperTable
    columns: tuple[FilledColumn, ...]
    of_claims: tuple[Result, ...]
    judgements: tuple[Judged, ...]

    @property
    def results(self) -> list[Result]:
        """Everything that the page rests on, in its cells or in its claims."""
        in_cells = [cell.result for column in self.columns for cell in column.cells if cell.result is not None]
        return [*in_cells, *self.of_claims]


def fill_table(table: PaperTable, runs: Sequence[tuple[str | None, RunResults]]) -> FilledTable:
    """Put the results of ``runs``, (column or None, run), beside the paper's cells; what was not run stays empty.

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
    filled = dict[str, FilledColumn]()
    for column in table.columns:
        its_run = of_column.get(column.name)
        results = () if its_run is None else _in_order_of_use(column, its_run.results)
        filled[column.name] = FilledColumn(column, its_run, tuple(fill_cell(cell, results) for cell in column.cells))
    judgements, of_claims = list[Judged](), list[Result]()
    for claim in table.claims:
        figure = "clean" if claim.measure == "clean" else "robust"
        paper = sum(weight * getattr(table.cell(*place), figure) for place, weight in claim.terms.items())
        stand_in = _stand_in(claim, filled)
        answers = list[Judgement]()
        for measure in ("robust", "worst") if claim.measure == "robust" else (claim.measure,):
            found = _results_of(table, filled, claim, measure)
            of_claims += [result for result in found.values() if result is not None]
            outcomes = {p: None if r is None else r.find(measure, table.cell(*p).where) for p, r in found.items()}
            answers.append(replace(judge(claim, paper, outcomes.__getitem__), stand_in=stand_in))
        judgements.append((answers[0], answers[1] if answers[1:] else None))
    return FilledTable(table, tuple(filled.values()), tuple(of_claims), tuple(judgements))


def _stand_in(claim: Claim, filled: Mapping[str, FilledColumn]) -> str:
    """Our models in the columns of a claim that are of others, by name."""
    columns = [filled[name] for name, _ in claim.terms if name in filled]
    ours = {c.run.model for c in columns if c.run is not None and c.stands_in and c.column.model is not None}
    return ", ".join(sorted(ours))


def columns_of_run(table: PaperTable, run: RunResults) -> list[Column]:
    """The columns that a run can fill: those of its zoo model, or of its training, or all of one model's table."""
    if table.column_is is not None:
        found = [column for column in table.columns if column.name == run.training.get(table.column_is)]
    elif any(column.model is not None for column in table.columns):
        found = [column for column in table.columns if column.model is not None and is_of(column, run)]
    else:
        found = list(table.columns)
    if not found:
        first = table.columns[0].name
        raise ConfigError(
            f"{run.folder}: {run.model} does not say which column of table {table.number} it is for",
            hint=f"say so: '{first}={run.folder}' (columns: {', '.join(c.name for c in table.columns)})",
        )
    return found


def is_of(column: Column, run: RunResults) -> bool:
    """Whether it is the column's own model: one name stands for an Linf and an L2 model, so the threat decides too."""
    source = run.source
    norm = column.cells[0].where.get("norm", source.threat)
    return (column.model, column.dataset, norm) == (source.name, source.dataset, source.threat)


def fill_cell(cell: Cell, results: Sequence[Result]) -> FilledCell:
    """A cell of the paper with the first of ``results`` that serves it."""
    result = next((r for r in results if _serves(cell, r)), None)
    return FilledCell(cell, result, Numbers() if result is None else Numbers.of(result, cell.where, result.base))


def _serves(cell: Cell, result: Result) -> bool:
    return result.fits(cell.where) and result.robust(cell.where) is not None


def _in_order_of_use(column: Column, results: Sequence[Result]) -> list[Result]:
    """The results that can stand in ``column``, those of the report first that fills most of its cells.

    Rows are compared with each other and the base model, so they come from one report where one has them all: on the
    same images, with the same pool. Among reports that fill as many, the one on most examples, then the youngest.
    """
    by_report: dict[Path, list[Result]] = {}
    for result in results:
        if any(_serves(cell, result) for cell in column.cells):
            by_report.setdefault(result.report, []).append(result)

    def worth(found: list[Result]) -> tuple[int, int, str]:
        n_filled = sum(any(_serves(cell, result) for result in found) for cell in column.cells)
        return n_filled, len(found[0].clean), found[0].finished

    return [result for found in sorted(by_report.values(), key=worth, reverse=True) for result in found]


def _results_of(
    table: PaperTable, filled: Mapping[str, FilledColumn], claim: Claim, measure: str
) -> dict[Place, Result | None]:
    """The result for each cell of a claim; that of a base model is from the report of another cell of the same run."""
    in_table = {(name, cell.cell.row): cell.result for name, column in filled.items() for cell in column.cells}
    cells = {place: table.cell(*place) for place in claim.terms}
    found = {place: in_table[cell.column, cell.row] for place, cell in cells.items() if not cell.is_base}
    runs = {name: column.run for name, column in filled.items()}
    for place, cell in cells.items():
        if cell.is_base:
            near = [r for p, r in found.items() if cell.column not in runs or runs[p[0]] is runs[cell.column]]
            bases = [r.base for r in near if r is not None and r.base is not None and r.base.fits(cell.where)]
            found[place] = bases[0] if bases else in_table.get((cell.column, cell.row))
    return found | (_on_most_images(filled, cells) if measure == "clean" else {})


def _on_most_images(filled: Mapping[str, FilledColumn], cells: Mapping[Place, Cell]) -> dict[Place, Result]:
    """A result for each cell of a claim on clean accuracy, whatever the attack: on the most images that all have.

    From one report where one has them all, the youngest of several.
    """
    runs = {name: column.run for name, column in filled.items() if column.run is not None}
    by_place: dict[Place, list[Result]] = {}
    for place, cell in cells.items():
        # a base model that stands in no column may be any run's; a column that was not run has no result
        candidates = [run for name, run in runs.items() if name == cell.column or cell.column not in filled]
        by_place[place] = [r for run in candidates for r in run.results if r.fits(cell.where, clean=True)]
    sizes = set.intersection(*({len(r.clean) for r in found} for found in by_place.values()))
    if not sizes:
        return {}
    largest = {p: [r for r in found if len(r.clean) == max(sizes)] for p, found in by_place.items()}
    shared = set.intersection(*({r.report for r in found} for found in largest.values()))
    return {
        place: max((r for r in found if r.report in shared or not shared), key=lambda r: (r.finished, r.report))
        for place, found in largest.items()
    }
