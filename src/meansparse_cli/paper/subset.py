"""``meansparse table subset RUN...``: statistics from a part of the training images against those from all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError
from ..operator.checkpoint import load_checkpoint
from ..runs.report import RunPaths
from .claims import RULE, Found, Judgement, claims_data, judge
from .fill import Numbers, is_of
from .page import render, typed
from .results import Result, RunResults, without_machine_paths
from .tables import Claim, PaperTable, Place

QUARTER = 0.25
"""From which share on the paper calls the statistics accurate: the means are off by less than 10 %."""


@dataclass(frozen=True)
class SubsetRow:
    """``errors`` of mean and std against all images: means of ratios, ratios of sums; ``ours``: gains over all."""

    fraction: float
    n_images: int
    errors: dict[str, float]
    ours: Numbers

    def to_report(self) -> dict[str, Any]:
        ours = self.ours.to_report()
        if "robust" not in ours:
            ours.pop("n_examples", None)
        order = sorted(ours, key=lambda key: ("gain" in key, key == "n_examples", key.endswith("error")))
        named = {key.replace("gain", "minus_all"): ours[key] for key in order}
        return {"fraction": self.fraction, "n_images": self.n_images} | self.errors | named


def fill_subset_table(
    table: PaperTable, runs: Sequence[RunResults], *, command: str, data_note: str | None
) -> tuple[str, dict[str, Any]]:
    """The page and its data. ``runs`` differ in ``calibrate --fraction``; one of them used all images."""
    by_fraction = _by_fraction(runs)
    whole, measured = by_fraction[1.0], {fraction: _result(run) for fraction, run in by_fraction.items()}
    rows = [_row(fraction, run, whole) for fraction, run in sorted(by_fraction.items())]
    judged = [(_judge(claim, measured, "robust"), _judge(claim, measured, "worst")) for claim in table.claims]
    is_own = any(is_of(column, whole) for column in table.columns)
    alphas = {result.where["alpha"] for run in runs for result in run.results} - {"0"}
    papers = [cell for column in table.columns for cell in column.cells]
    page = render(
        "subset.md",
        table=table,
        whole=whole,
        is_own=is_own,
        data_note=data_note,
        rows=rows,
        papers=zip(*(column.cells for column in table.columns), strict=True),
        alpha=", ".join(alphas),
        quarter=next((row for row in rows if row.fraction == QUARTER), None),
        theirs=[cell.clean for cell in papers if float(cell.row) == QUARTER],
        judgements=judged,
        typed=typed(list(by_fraction.values()), [r for r in measured.values() if r is not None], command),
    )
    errors = {
        column.name: [{"fraction": float(c.row), "mean_error": c.clean, "std_error": c.robust} for c in column.cells]
        for column in table.columns
    }
    head = {"table": table.number, "title": table.title, "paper": table.source, "data": data_note, "model": whole.model}
    made = {"is_the_papers_model": is_own, "command": without_machine_paths(command), "rule": RULE}
    data = head | made | {"paper_errors": errors, "rows": [row.to_report() for row in rows]}
    return page, data | {"claims": claims_data(judged)}


def _by_fraction(runs: Sequence[RunResults]) -> dict[float, RunResults]:
    """The runs by the share of the images behind their statistics. Raises ConfigError where they cannot be compared."""
    by_fraction = {fraction_of(run): run for run in runs}
    if len(by_fraction) < len(runs):
        raise ConfigError("two runs have the same --fraction", hint="give one of them")
    if 1.0 not in by_fraction:
        raise ConfigError(
            "none of the runs took its statistics from all calibration images",
            hint="meansparse calibrate without --fraction",
        )
    alphas = {result.where["alpha"] for run in runs for result in run.results} - {"0"}
    if len(alphas) > 1:
        raise ConfigError(
            f"the runs were measured at several alphas: {', '.join(sorted(alphas))}", hint="measure one alpha"
        )
    return by_fraction


def fraction_of(run: RunResults) -> float:
    """The share of the calibration split that the statistics are from. Raises ConfigError where that is not known."""
    settings = run.calibrated["config"]["settings"]
    if (n := settings.get("n_examples")) is not None:
        raise ConfigError(
            f"{run.folder}: its statistics are from --n-examples {n}, which is no share of all images",
            hint="meansparse calibrate with --fraction, or without either",
        )
    return float(settings.get("fraction") or 1.0)


def relative_errors(part: Sequence[np.ndarray], whole: Sequence[np.ndarray]) -> tuple[float, float]:
    """(mean of the channels' relative errors, sum of errors over sum of values), but for channels of 0 in ``whole``.

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
    pairs = {
        name: relative_errors(*([getattr(s, name).double().numpy() for s in c.statistics] for c in (mine, theirs)))
        for name in ("mean", "std")
    }
    errors = {f"{name}_error{of}": pairs[name][i] for i, of in enumerate(("", "_of_sums")) for name in pairs}
    result, of_all = _result(run), None if run is whole else _result(whole)
    if result is None:
        numbers = Numbers()
    elif of_all is not None and not (np.array_equal(result.example, of_all.example) and result.where == of_all.where):
        raise ConfigError(
            f"{run.folder} and {whole.folder} were not measured on the same images in the same way",
            hint="measure them with the same options",
        )
    else:
        numbers = Numbers.of(result, {"attack": _attack(result)}, of_all)
    return SubsetRow(fraction, run.calibrated["results"]["n_images"], errors, numbers)


def _result(run: RunResults) -> Result | None:
    """The one at an alpha above 0."""
    found = [result for result in run.results if result.base is not None and result.where["split"] == "test"]
    return max(found, key=lambda r: (len(r.clean), r.finished), default=None)


def _attack(result: Result) -> str:
    return "apgd" if result.robust({"attack": "apgd"}) is not None else "apgd-ce"


def _judge(claim: Claim, by_fraction: Mapping[float, Result | None], measure: str) -> Judgement:
    def find(place: Place) -> Found:
        result = by_fraction.get(float(place[0]))
        return None if result is None else result.find(measure, {"attack": _attack(result)})

    return judge(claim, claim.paper or 0.0, find)
