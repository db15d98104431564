"""``meansparse table subset RUN...``: statistics from a part of the training images against those from all of them.

Error of the mean: over all channels of all sites, the mean of abs(part - all) / abs(all); that of the std likewise. The
paper does not define its "relative mean absolute error"; the other reading, the sum of the absolute errors over the
sum of the absolute values, which no channel with a mean near 0 can dominate, is given as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..operator.checkpoint import load_checkpoint
from ..runs.report import RunPaths, read_report
from ..stats.format import in_points, percent
from ..stats.paired import Accuracy, PairedDifference, accuracy_of, paired_difference
from .claims import BRACKETS, RULE, judge, sentence
from .page import commands_section
from .results import Outcomes, Result, RunResults, without_machine_paths
from .table import is_of
from .tables import Claim, PaperTable

QUARTER, ACCURATE = 0.25, 0.1


@dataclass(frozen=True)
class SubsetRow:
    """``mean`` and ``std``: (mean of ratios, ratio of sums) of the errors against all images; gains against them, paired."""

    fraction: float
    n_images: int
    mean: tuple[float, float]
    std: tuple[float, float]
    clean: Accuracy | None
    robust: Accuracy | None
    worst: Accuracy | None
    robust_minus_all: PairedDifference | None
    worst_minus_all: PairedDifference | None


def fill_subset_table(
    table: PaperTable, runs: Sequence[RunResults], *, command: str, data_note: str | None
) -> tuple[str, dict[str, Any]]:
    """The page and its data. ``runs`` differ in ``calibrate --fraction``; one of them used all images."""
    by_fraction = {fraction_of(run): run for run in runs}
    if len(by_fraction) < len(runs):
        raise ConfigError("two runs have the same --fraction", hint="give one of them")
    whole = by_fraction.get(1.0)
    if whole is None:
        raise ConfigError(
            "none of the runs took its statistics from all calibration images",
            hint="meansparse calibrate without --fraction",
        )
    alpha = {result.where["alpha"] for run in runs for result in run.results} - {"0"}
    if len(alpha) > 1:
        raise ConfigError(
            f"the runs were measured at several alphas: {', '.join(sorted(alpha))}", hint="measure one alpha"
        )
    rows = [_row(fraction, run, whole) for fraction, run in sorted(by_fraction.items())]
    judged = []
    for claim in table.claims:
        pair = [
            ("APGD", _judge(claim, by_fraction, "robust")),
            ("Worst case, BPDA included", _judge(claim, by_fraction, "worst")),
        ]
        judged.append(pair)
    lines = [f"# {table.title[0].upper()}{table.title[1:]}", ""]
    is_own = any(is_of(column, whole) for column in table.columns)
    other = "" if is_own else "**another model than the paper's**, "
    lines += [f"Paper: {table.source}, its models. Ours: `{whole.model}`, {other}"
              f"{data_note or 'the data that the commands name'}; {max(r.n_images for r in rows):,} calibration images are all.", ""]  # fmt: skip
    lines += [
        "The paper's errors, mean / std:",
        "",
        *_paper(table),
        "",
        f"Ours; accuracies at alpha {', '.join(alpha) or '-'}:",
        "",
    ]
    lines += [*_page(rows), "", *_about_the_means(table, rows), *[f"- {sentence(pair)}" for pair in judged], ""]
    lines += [f"Rule: {RULE}. {BRACKETS}.", ""]
    lines += ["Errors: " + (__doc__ or "").split("Error of the mean: ")[1].replace("\n", " ").strip(), ""]
    used = [result for run in by_fraction.values() if (result := _result(run)) is not None]
    data = {
        "table": table.number, "title": table.title, "paper": table.source, "data": data_note, "model": whole.model,
        "is_the_papers_model": is_own,
        "command": without_machine_paths(command), "rule": RULE,
        "paper_errors": {
            column.name: [{"fraction": float(c.row), "mean_error": c.clean, "std_error": c.robust} for c in column.cells]
            for column in table.columns
        },
        "rows": [_data(row) for row in rows],
        "claims": [{"text": pair[0][1].claim.text, "under_its_attack": pair[0][1].to_report(), "worst_case": pair[1][1].to_report()} for pair in judged],
    }  # fmt: skip
    return "\n".join(lines + commands_section(list(by_fraction.values()), used, command)), data


def fraction_of(run: RunResults) -> float:
    """The share of the calibration split that the statistics of a run are from. Raises ConfigError where that is not known."""
    report = read_report(RunPaths(run.folder).report("calibrate"), "calibrate", mend="meansparse calibrate")
    settings = report["config"]["settings"]
    if settings.get("n_examples") is not None:
        raise ConfigError(
            f"{run.folder}: its statistics are from --n-examples {settings['n_examples']}, which is no share of all images",
            hint="meansparse calibrate with --fraction, or without either",
        )
    return float(settings.get("fraction") or 1.0)


def relative_errors(part: Sequence[np.ndarray], whole: Sequence[np.ndarray]) -> tuple[float, float]:
    """(mean of the channels' relative errors, sum of errors over sum of values); channels that are 0 in ``whole`` are left out.

    >>> relative_errors([np.array([1.25, 3.0])], [np.array([1.0, 3.0])])
    (0.125, 0.0625)
    """
    mine, theirs = np.concatenate(list(part)), np.concatenate(list(whole))
    used = theirs != 0
    errors, sizes = np.abs(mine - theirs)[used], np.abs(theirs)[used]
    return float((errors / sizes).mean()), float(errors.sum() / sizes.sum())


def _row(fraction: float, run: RunResults, whole: RunResults) -> SubsetRow:
    mine, theirs = (load_checkpoint(RunPaths(r.folder).statistics) for r in (run, whole))
    if [site.name for site in mine.sites] != [site.name for site in theirs.sites]:
        raise ConfigError(f"{run.folder} and {whole.folder} have other sites", hint="calibrate them alike")
    report = read_report(RunPaths(run.folder).report("calibrate"), "calibrate", mend="meansparse calibrate")
    mean, std = (
        relative_errors(*([getattr(s, name).double().numpy() for s in c.statistics] for c in (mine, theirs)))
        for name in ("mean", "std")
    )
    result, all_of_it = _result(run), _result(whole)
    robust, worst = (None, None) if result is None else (_plain(result), result.worst)
    if result is None or all_of_it is None or run is whole:
        gains: list[PairedDifference | None] = [None, None]
    else:
        if not np.array_equal(result.example, all_of_it.example) or result.where != all_of_it.where:
            raise ConfigError(
                f"{run.folder} and {whole.folder} were not measured on the same images in the same way",
                hint="measure them with the same options",
            )
        other = (_plain(all_of_it), all_of_it.worst)
        gains = [
            None if a is None or b is None else paired_difference(a, b)
            for a, b in zip((robust, worst), other, strict=True)
        ]
    return SubsetRow(
        fraction, report["results"]["n_images"], mean, std, None if result is None else accuracy_of(result.clean),
        None if robust is None else accuracy_of(robust), None if worst is None else accuracy_of(worst), *gains,
    )  # fmt: skip


def _result(run: RunResults) -> Result | None:
    """The one at an alpha above 0."""
    found = [result for result in run.results if result.base is not None and result.where["split"] == "test"]
    return max(found, key=lambda r: (len(r.clean), r.finished), default=None)


def _plain(result: Result) -> Outcomes | None:
    for attack in ("apgd", "apgd-ce"):
        if (robust := result.robust({"attack": attack})) is not None:
            return robust
    return None


def _judge(claim: Claim, by_fraction: dict[float, RunResults], measure: str) -> Any:
    def find(place: tuple[str, str]) -> Any:
        run = by_fraction.get(float(place[0]))
        result = None if run is None else _result(run)
        outcomes = None if result is None else result.worst if measure == "worst" else _plain(result)
        return None if result is None or outcomes is None else (result.example, outcomes)

    return judge(claim, claim.paper or 0.0, find)


def _paper(table: PaperTable) -> list[str]:
    names = [column.name for column in table.columns]
    lines = [f"| part | {' | '.join(names)} |", "|" + "---|" * (len(names) + 1)]
    for i, cell in enumerate(table.columns[0].cells):
        cells = [f"{column.cells[i].clean:.4f} / {column.cells[i].robust:.4f}" for column in table.columns]
        lines.append(f"| {100 * float(cell.row):g} % | {' | '.join(cells)} |")
    return lines


def _about_the_means(table: PaperTable, rows: Sequence[SubsetRow]) -> list[str]:
    """The paper calls the statistics accurate where the means are off by less than 10 %, which it finds from 25 % on."""
    row = next((row for row in rows if row.fraction == QUARTER), None)
    if row is None:
        return []
    theirs = [
        cell.clean for column in table.columns for cell in column.cells if float(cell.row) == QUARTER and cell.clean
    ]
    side = "below it" if row.mean[0] < ACCURATE else "not below it"
    return [
        f"- With 25 % of the training set the relative error of the means is below 10 % (paper: {100 * min(theirs):.2f} to "
        f"{100 * max(theirs):.2f} %). Ours, one draw of images: {100 * row.mean[0]:.2f} %, {side}."
    ]


def _page(rows: Sequence[SubsetRow]) -> list[str]:
    names = [
        "part", "images", "mean: error", "std: error", "mean: of sums", "std: of sums", "clean", "APGD", "APGD - all",
        "worst case", "worst case - all", "test images",
    ]  # fmt: skip
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [f"{100 * row.fraction:g} %", f"{row.n_images:,}"]
        cells += [f"{value:.4f}" for value in (row.mean[0], row.std[0], row.mean[1], row.std[1])]
        cells += ["" if a is None else percent(a.fraction, a.standard_error) for a in (row.clean, row.robust)]
        cells += [
            _gain(row.robust_minus_all),
            "" if row.worst is None else percent(row.worst.fraction, row.worst.standard_error),
        ]
        cells += [_gain(row.worst_minus_all), "" if row.robust is None else f"{row.robust.n:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _gain(gain: PairedDifference | None) -> str:
    return "" if gain is None else in_points(gain.difference, gain.standard_error)


def _data(row: SubsetRow) -> dict[str, Any]:
    names = ("clean", "robust", "worst")
    accuracies: dict[str, Accuracy | None] = {name: getattr(row, name) for name in names}
    differences = {"robust_minus_all": row.robust_minus_all, "worst_minus_all": row.worst_minus_all}
    return {
        "fraction": row.fraction, "n_images": row.n_images, "mean_error": row.mean[0], "std_error": row.std[0],
        "mean_error_of_sums": row.mean[1], "std_error_of_sums": row.std[1],
        **{name: a.fraction for name, a in accuracies.items() if a is not None},
        **{f"{name}_standard_error": a.standard_error for name, a in accuracies.items() if a is not None},
        **({} if row.robust is None else {"n_examples": row.robust.n}),
        **{name: d.difference for name, d in differences.items() if d is not None},
        **{f"{name}_standard_error": d.standard_error for name, d in differences.items() if d is not None},
    }  # fmt: skip
