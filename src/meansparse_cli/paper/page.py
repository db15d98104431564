"""A filled table as a page (Markdown) and as data (YAML)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..stats.format import in_points, percent
from ..stats.paired import Accuracy, PairedDifference
from .claims import BRACKETS, RULE, sentence
from .results import Result, RunResults, without_machine_paths
from .table import FilledCell, FilledColumn, FilledTable, fill_cell
from .tables import PaperTable, in_paper

COLUMN_NOTES = (
    "`±` is one standard error, beside `ours - paper` it is ours alone, as the paper gives none; gains over the base model are paired, on the same images. The worst case, which the paper "
    "does not have, counts an example as robust only if it survives every attack that was run, BPDA (gradients by another "
    "rule than the operator's own) and images found on other models of the row's report included. Cells that were not run are empty."
)


def table_page(filled: FilledTable, *, command: str, data_note: str | None) -> str:
    """The page: what it is and is not, a table a column of the paper, the claims, the commands."""
    table = filled.table
    name = in_paper(table.number)
    lines = [f"# {name[0].upper()}{name[1:]}: {table.title}", "", *_notes(filled, data_note), ""]
    for column in filled.columns:
        if len(filled.columns) > 1 or column.run is not None:
            lines += [f"## {column.column.name}", "", _of_column(table, column), ""]
        lines += [*_rows(filled, column), ""]
    lines += ["## What the paper says, and what we find", ""]
    for own, worst in filled.judgements:
        measures = [("Clean accuracy" if own.claim.measure == "clean" else "The paper's attack", own)]
        if worst is not None:
            measures.append(("Worst case, BPDA included", worst))
        lines += [f"- {sentence(measures)}"]
    lines += ["", f"Rule: {RULE}. {BRACKETS}.", ""]
    runs = list({id(c.run): c.run for c in filled.columns if c.run is not None}.values())
    return "\n".join(lines + commands_section(runs, filled.results, command))


def table_data(filled: FilledTable, *, command: str, data_note: str | None) -> dict[str, Any]:
    """The same for programs: fractions, a list of cells a column."""
    table = filled.table
    return {
        "table": table.number, "title": table.title, "attack": table.attack, "paper": table.source, "data": data_note,
        "command": without_machine_paths(command),
        "columns": {
            column.column.name: {
                "model": None if column.run is None else column.run.model,
                "is_the_papers_model": column.run is not None and not column.stands_in,
                "paper_n_examples": column.column.n_examples,
                "cells": [cell.to_report() for cell in column.cells],
            }
            for column in filled.columns
        },
        "claims": [
            {"text": own.claim.text, "measure": own.claim.measure, "under_its_attack": own.to_report()}
            | ({} if worst is None else {"worst_case": worst.to_report()})
            for own, worst in filled.judgements
        ],
        "rule": RULE,
    }  # fmt: skip


def commands_section(runs: Sequence[RunResults], results: Sequence[Result], command: str) -> list[str]:
    """What was typed to get there: what prepared the runs, then what measured the cells, in the order it was finished."""
    measured = [result.command for result in sorted(results, key=lambda result: result.finished)]
    typed = dict.fromkeys(
        without_machine_paths(c) for c in [*(c for run in runs for c in run.commands), *measured, command]
    )
    return ["## Commands", "", "```console", *typed, "```", ""]


def _notes(filled: FilledTable, data_note: str | None) -> list[str]:
    used = [column for column in filled.columns if column.run is not None]
    notes = [
        f"Paper: {filled.table.source}. Ours: " + (f"{data_note}." if data_note else "the data that the commands name.")
    ]
    if not used:
        return [*notes, "", "Nothing of it was run."]
    stand_ins = sorted({f"`{column.run.model}`" for column in used if column.run is not None and column.stands_in})
    if stand_ins:
        notes.append(
            f"**Another model than the paper's**: {', '.join(stand_ins)}. The difference to the paper is one between models; "
            "what compares is the gain over the base model."
        )
    reduced = {
        n for column in used for n in column.n_examples if column.column.n_examples and n < column.column.n_examples
    }
    if reduced:
        full = " or ".join(f"{n:,}" for n in sorted({c.column.n_examples for c in used if c.column.n_examples}))
        notes.append(
            f"**Reduced size**: {', '.join(f'{n:,}' for n in sorted(reduced))} images, where the paper has {full}."
        )
    if any(cell.cell.where.get("split") == "calibration" for column in used for cell in column.cells):
        notes.append("**Train columns**: training images, those that the statistics were computed from.")
    if filled.table.note:
        notes.append(f"**Left open**: {filled.table.note}.")
    named = dict.fromkeys(result.machine for result in filled.results)
    machines = [name for name in named if not any(other != name and other.startswith(name) for other in named)]
    if machines:
        notes.append(f"Measured on {'; '.join(machines)}.")
    notes.append(COLUMN_NOTES)
    shown = [a for column in used for cell in column.cells for a in (cell.clean, cell.robust, cell.worst)]
    extreme = [a.n for a in shown if a is not None and a.fraction in (0, 1)]
    if extreme:  # where the binomial error is 0, and says nothing
        notes.append(
            f"Where 0 or 100 % of n images are right, `±` says nothing: the 95 % bound lies 3 / n away, "
            f"{300 / min(extreme):.2g} points at {min(extreme):,} images."
        )
    return [line for note in notes for line in (note, "")][:-1]


def _of_column(table: PaperTable, column: FilledColumn) -> str:
    note = f" ({column.column.note[0].upper()}{column.column.note[1:]}.)" if column.column.note else ""
    if column.run is None:
        return f"Not run.{note}"
    clean = "" if column.column.clean is None else f" Clean, paper: {percent(column.column.clean)} %."
    own = next(
        (cell.clean for cell in column.cells if column.column.clean is not None and cell.clean is not None), None
    )
    if own is not None:
        clean += f" Clean, ours: {percent(own.fraction, own.standard_error)} %."
    stands = f", in place of the paper's {column.column.model}" if column.stands_in and column.column.model else ""
    numbers = ", ".join(f"{n:,}" for n in column.n_examples)
    sites = _sites(column, column.run)
    images = f"Images: {numbers}." if numbers else "Not run."
    if column.attacks:
        images += f" Worst case over {', '.join(column.attacks)} and transfer."
    return f"Model: `{column.run.model}`{stands}, {sites}.{note} {images}{clean}{_training(column.run.training)}"


def _sites(column: FilledColumn, run: RunResults) -> str:
    """Which of the calibrated sites the cells of a column are about."""
    rules = list(
        dict.fromkeys(cell.cell.where.get("sites", "all") for cell in column.cells if float(cell.cell.where["alpha"]))
    )
    if rules in ([], ["all"]):
        return f"{run.n_sites} sites (`--sites {run.site_rule}`)"
    return f"operators at {' to '.join(f'`--sites {rule}`' for rule in dict.fromkeys((rules[0], rules[-1])))} of {run.n_sites} sites"


def _training(training: dict[str, Any]) -> str:
    """How `meansparse train` made the model, in a sentence; nothing where its weights do not say."""
    if "epochs" not in training:
        return ""
    n = training["n_examples"]
    words = [training["method"] + (f" with beta {training['beta']:g}" if training["method"] == "trades" else "")]
    words += [training["activation"]] if "activation" in training else []
    words += [f"width {training['width']}", f"{training['epochs']} epochs of {f'{n:,}' if n else 'all'} images"]
    if training["method"] != "standard":
        words.append(f"{training['n_steps']} steps of {training['step_size']} within {training['eps']}")
    words += [
        f"batch {training['batch_size']}",
        f"{training['schedule']} from {training['lr']:g}",
        f"seed {training['seed']}",
    ]
    if training.get("paper_selection"):
        words.append("best epoch chosen on test images")
    if training.get("mean_sparse_alpha") is not None:
        words.append(f"the operator in place at alpha {training['mean_sparse_alpha']:g}")
    if training.get("ema") is not None:
        words.append(f"averaged weights (EMA {training['ema']:g})")
    if training.get("precision", "fp32") != "fp32":
        words.append(training["precision"])
    return f" Training: {', '.join(words)}."


def _rows(filled: FilledTable, column: FilledColumn) -> list[str]:
    table = filled.table
    has_clean = any(cell.cell.clean is not None for cell in column.cells)
    names = [
        table.by,
        *(["clean: paper", "ours"] if has_clean else []),
        f"{column.column.attack}: paper",
        "ours",
        "ours - paper",
    ]
    names += ["gain: paper", "gain: ours", "worst case", "worst case: gain", "images"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for cell in [*_base_row(filled, column), *column.cells]:
        is_base = cell.cell in table.extra.values()
        row = ["base" if is_base else cell.cell.row]
        if has_clean:
            row += ["" if cell.cell.clean is None else percent(cell.cell.clean), _accuracy(cell.clean)]
        row += [percent(cell.cell.robust), _accuracy(cell.robust), _minus_paper(cell)]
        base = None if is_base else filled.paper_base.get((column.column.name, cell.cell.row))
        row += ["" if base is None else in_points(cell.cell.robust - base.robust)]
        n = "" if cell.robust is None else f"{cell.robust.n:,}"
        row += [_gain(cell.robust_gain), _accuracy(cell.worst), _gain(cell.worst_gain), n]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _base_row(filled: FilledTable, column: FilledColumn) -> list[FilledCell]:
    """The base model on top of a column, where the table has one that stands in no column."""
    result = next((cell.result.base for cell in column.cells if cell.result is not None), None)
    return [fill_cell(cell, [] if result is None else [result]) for cell in filled.table.extra.values()]


def _accuracy(accuracy: Accuracy | None) -> str:
    return "" if accuracy is None else percent(accuracy.fraction, accuracy.standard_error)


def _gain(gain: PairedDifference | None) -> str:
    return "" if gain is None else in_points(gain.difference, gain.standard_error)


def _minus_paper(cell: FilledCell) -> str:
    robust = cell.robust
    return "" if robust is None else in_points(robust.fraction - cell.cell.robust, robust.standard_error)
