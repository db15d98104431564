"""What finished evaluations and measurements of a run found, example by example."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..attacks import expand_attacks
from ..engine.outcomes import CLEAN, TRANSFER, is_bpda
from ..files import sha256_of
from ..reporting.console import note
from ..runs.report import RunPaths, machine_of, read_report, stage_command, verify_outputs

if TYPE_CHECKING:
    from ..models.source import ModelSource

Outcomes = NDArray[np.bool_]


@dataclass(frozen=True)
class Result:
    """One model (``alpha``, ``sites``, ``centre``) at one budget on n examples.

    ``clean`` (n,) bool; ``robust_to(attacks)`` (n,) bool or None where that is not known; ``worst`` (n,) bool, None unless
    BPDA was run. ``attacks``: all that were run. ``base`` is the same at alpha = 0 from the same ``report`` (None: this is it).
    """

    report: Path
    where: dict[str, str]
    example: NDArray[np.int64]
    clean: Outcomes
    worst: Outcomes | None
    robust_to: Callable[[frozenset[str]], Outcomes | None]
    attacks: tuple[str, ...]
    finished: str
    command: str
    machine: str
    base: Result | None

    def fits(self, where: dict[str, str], *, clean: bool = False) -> bool:
        """Whether it is a result of what a cell of the paper describes, whichever the attack; ``clean``: and its budget."""
        is_base = Fraction(where["alpha"]) == 0
        for key, wanted in where.items():
            if key == "attack" or (clean and key in ("eps", "norm")) or (is_base and key in ("sites", "centre")):
                continue
            mine = self.where[key]
            if key in ("alpha", "eps"):
                if Fraction(mine) != Fraction(wanted):
                    return False
            elif mine != wanted:
                return False
        return True

    def robust(self, where: dict[str, str]) -> Outcomes | None:
        """Under the attack of a cell of the paper."""
        return self.robust_to(attacks_of(where["attack"]))


def attacks_of(name: str) -> frozenset[str]:
    """The attacks that a name or a preset means.

    >>> sorted(attacks_of("apgd"))
    ['apgd-ce', 'apgd-dlr']
    """
    return frozenset(expand_attacks([name]))


@dataclass(frozen=True)
class RunResults:
    """All results of a run folder. ``training``: what the weights say about how they were trained, {} if nothing.

    ``site_rule`` and ``n_sites``: of the statistics. ``commands``: what was typed to prepare it.
    """

    folder: Path
    source: ModelSource
    training: dict[str, Any]
    results: tuple[Result, ...]
    commands: tuple[str, ...]
    site_rule: str
    n_sites: int

    @property
    def model(self) -> str:
        """The model's name as people read it; a file of ``meansparse train`` by the folder it is in."""
        path = Path(self.source.name)
        if path.suffix != ".safetensors":
            return self.source.name
        return path.parent.name if path.stem == "model" else path.stem


def read_results(folder: Path) -> RunResults:
    """Every evaluation and measurement in ``folder``. Raises ArtifactError for a folder, report or file that is not whole."""
    from ..models.source import ModelSource, kind_of

    paths = RunPaths(folder)
    mend = f"meansparse calibrate --run {folder} --model NAME"
    fetched = read_report(paths.report("fetch"), "fetch", mend=f"meansparse fetch --run {folder} --model NAME")
    calibrated = read_report(paths.report("calibrate"), "calibrate", mend=mend)
    source = ModelSource(**fetched["results"]["model"])
    found: list[Result] = []
    for pattern, stage, read in (
        ("evaluate.yaml", "evaluate", _of_evaluation),
        ("evaluations/*/evaluate.yaml", "evaluate", _of_evaluation),
        ("measurements/*/measure.yaml", "measure", _of_measurement),
    ):
        for file in sorted(folder.glob(pattern)):
            if (report := _verified(file, stage, folder, paths)) is None:
                continue
            if other := _of_other_images(report, calibrated, source):
                note(f"left out: {file} was measured with {other}")
                continue
            found += read(file, report, calibrated)
    made_by = [fetched, calibrated] if (trained := _trained(source)) is None else [trained, fetched, calibrated]
    typed = tuple(dict.fromkeys(report["provenance"]["command"] for report in made_by))
    chosen = calibrated["results"]
    return RunResults(
        folder, source, kind_of(source).training(), tuple(found), typed, chosen.get("rule", "all"), len(chosen["sites"])
    )


def _trained(source: ModelSource) -> dict[str, Any] | None:
    """The report of `meansparse train` beside the weights, if they are still the ones it is about."""
    weights = Path(source.name)
    file = weights.with_name("train.yaml")
    if not (weights.is_file() and file.is_file()):
        return None
    report = read_report(file, "train", mend=f"the command that trained {file.parent}, with")
    return report if report["outputs"].get(weights.name) == sha256_of(weights) else None


def _verified(file: Path, stage: str, folder: Path, paths: RunPaths) -> dict[str, Any] | None:
    """The report, with the settings of the sweep that it evaluates; None for one of other statistics than the folder's."""
    mend = stage_command(stage, folder, None if file.parent == folder else file.parent.name)
    report = read_report(file, stage, mend=mend)
    verify_outputs(report, file.parent, mend=mend)
    for upstream in ("calibrate", "sweep-alpha"):
        expected = report["inputs"].get(f"{upstream}.yaml")
        used = paths.report(upstream)
        if expected is not None and (not used.exists() or expected != sha256_of(used)):
            note(f"left out: {file} was made from another {upstream}.yaml than the one in {folder}")
            return None
    if "sweep-alpha.yaml" in report["inputs"]:
        swept = read_report(paths.report("sweep-alpha"), "sweep-alpha", mend=mend)["config"]["settings"]
        report["config"]["settings"] |= {key: swept[key] for key in ("sites", "centre", "spread", "alpha_rule")}
    return report


def _of_other_images(report: dict[str, Any], calibrated: dict[str, Any], source: ModelSource) -> str:
    """In what the images of a result differ in kind from those behind the statistics, in words; "" in nothing.

    A table's columns are about one data set, which no result of another may fill.
    """
    mine, theirs = (
        {"--dataset": held.get("dataset"), "--preprocessing": held.get("preprocessing")}
        for held in (report["config"]["settings"], calibrated["config"]["settings"])
    )  # what a measurement was not told it takes from calibrate
    theirs["--dataset"] = theirs["--dataset"] or source.dataset
    return ", ".join(
        f"{key} {mine[key]}, the statistics with {theirs[key] or 'the default'}"
        for key in mine
        if mine[key] is not None and mine[key] != theirs[key]
    )


def _settings(report: dict[str, Any], calibrated: dict[str, Any], sites: str) -> dict[str, str]:
    """What a cell of the paper is looked up by. Site rules mean the calibrated sites: where those are not all of the model's,
    a rule relative to them keeps their rule in front, so that it fits no cell of the paper; ``single:N`` names a site itself.
    """
    settings = report["config"]["settings"]
    used = calibrated["results"].get("rule", "all")
    if used not in ("all", "published") and not sites.startswith("single:"):
        sites = used if sites == "all" else f"{used} / {sites}"
    return {
        "norm": settings["norm"], "split": settings.get("split", "test"), "centre": settings.get("centre", "channel-mean"),
        "sites": sites,
    }  # fmt: skip


def _of_evaluation(file: Path, report: dict[str, Any], calibrated: dict[str, Any]) -> list[Result]:
    settings = report["config"]["settings"]
    where = _settings(report, calibrated, settings.get("sites", "all")) | {
        "eps": report["results"].get("eps") or settings["eps"]
    }
    with np.load(file.with_name("outcomes.npz")) as arrays:
        names = [str(name) for name in arrays["name"]]
        example, tables = arrays["index"], {m: arrays[f"{m}_outcome"] for m in ("base", "sparsified")}
    attacks = tuple(name for name in names if name not in (CLEAN, TRANSFER))
    has_bpda = any(is_bpda(name) for name in attacks)

    def result(model: str, alpha: float, base: Result | None) -> Result:
        table = tables[model]
        return Result(
            file, where | {"alpha": f"{alpha:g}"}, example, table[:, 0] == 0, (table != 1).all(1) if has_bpda else None,
            lambda wanted: _robust_to(table, names, wanted), attacks, *_when(report), base,
        )  # fmt: skip

    base = result("base", 0.0, None)
    alpha = float(report["results"]["alpha"])
    return [base, result("sparsified", alpha, base)] if alpha and _is_the_papers(settings) else [base]


def _is_the_papers(settings: dict[str, Any]) -> bool:
    """One alpha for all sites, in each channel's own standard deviations: what every table of the paper has."""
    return settings.get("alpha_rule", "shared") == "shared" and settings.get("spread", "channel-std") == "channel-std"


def _robust_to(table: NDArray[np.int8], names: Sequence[str], attacks: frozenset[str]) -> Outcomes | None:
    if not attacks <= set(names):
        return None
    columns = [0, *(names.index(attack) for attack in sorted(attacks))]
    chosen = table[:, columns]
    robust: Outcomes = (chosen != 1).all(1)
    return robust if not ((chosen == -1).any(1) & robust).any() else None


def _of_measurement(file: Path, report: dict[str, Any], calibrated: dict[str, Any]) -> list[Result]:
    with np.load(file.with_name("outcomes.npz")) as stored:
        arrays = {name: stored[name] for name in stored.files}
    attacks = frozenset(report["results"]["attacks"])  # none: clean images alone
    found: list[Result] = []
    base: Result | None = None
    for i, row in enumerate(report["results"]["rows"]):
        if row["alpha"] and not _is_the_papers(report["config"]["settings"]):
            continue
        where = _settings(report, calibrated, row["sites"]) | {"eps": row["eps"], "alpha": f"{row['alpha']:g}"}
        plain, worst = (arrays["plain"][i], arrays["worst"][i]) if attacks else (None, None)
        result = Result(
            file, where, arrays["index"], arrays["clean"][i], worst,
            lambda wanted, plain=plain: plain if wanted == attacks else None,  # type: ignore[misc]
            tuple(report["results"]["attacks"]) + tuple(report["results"]["bpda_attacks"]),
            *_when(report), None if row["alpha"] == 0 else base,
        )  # fmt: skip
        base = result if row["alpha"] == 0 else base
        found.append(result)
    return found


def _when(report: dict[str, Any]) -> tuple[str, str, str]:
    made, results = report["provenance"], report["results"]
    machine = f"{machine_of(made)}, torch {made['versions']['torch']}"
    if results.get("attacks", True):  # an empty list: clean images alone
        precision = results.get("search", results).get("precision") or report["config"]["settings"].get("precision")
        machine += f", attacks in {precision or 'fp32'}, judged in float32"
    return made["finished"], made["command"], machine


def without_machine_paths(command: str) -> str:
    """A command as others can type it: the data folder is DIR, and no other path is absolute.

    >>> without_machine_paths("meansparse fetch --model '/data/my models/w16.safetensors' --data-dir=/data/cifar")
    "meansparse fetch --model 'my models/w16.safetensors' --data-dir=DIR"
    """
    words = shlex.split(command)
    for i, word in enumerate(words):
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if (option == "--data-dir" and equals) or (i and words[i - 1] == "--data-dir"):
            words[i] = f"{option}{equals}DIR"
        elif value.startswith("/"):
            words[i] = option + equals + "/".join(Path(value).parts[1:][-2:])
        elif not option and "=/" in word:  # COLUMN=FOLDER
            column, _, folder = word.partition("=")
            words[i] = f"{column}={'/'.join(Path(folder).parts[1:][-2:])}"
    return shlex.join(words)
