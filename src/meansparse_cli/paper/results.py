"""What finished evaluations and measurements of a run found, example by example."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..attacks import expand_attacks
from ..engine.outcomes import CLEAN, MODELS, TRANSFER, is_bpda
from ..files import sha256_of
from ..runs.report import RunPaths, machine_of, read_report, stage_command, verify_outputs
from ..settings.stages import OPERATOR_OPTIONS

if TYPE_CHECKING:
    from ..models.source import ModelSource

log = logging.getLogger(__name__)

Outcomes = NDArray[np.bool_]
_Row = tuple[dict[str, Any], Any, Any, dict[frozenset[str], Any]]
"""One model at one eps in a report: alpha, eps and sites; ``clean``, ``worst`` and ``broken`` of ``Result``."""
PLACES = ("evaluate.yaml", "evaluations/*/evaluate.yaml", "measurements/*/measure.yaml")
READ: dict[str, Callable[[str], object]] = {"alpha": Fraction, "eps": Fraction}
OF_THE_OPERATOR = (*OPERATOR_OPTIONS, "alpha_rule")


@dataclass(frozen=True)
class Result:
    """One model at one budget on n examples, as ``where`` says. ``clean`` (n,) bool; ``worst`` (n,) bool, with BPDA.

    ``broken``: for attacks that were run (together, where nobody knows which of them broke what) (n,) int: 1 wrong,
    0 right, -1 not tried. ``base`` is the same at alpha = 0 from the same ``report`` (None: this is it).
    """

    report: Path
    where: dict[str, str]
    example: NDArray[np.int64]
    clean: Outcomes
    worst: Outcomes | None
    broken: dict[frozenset[str], NDArray[np.int8]]
    attacks: tuple[str, ...]
    finished: str
    command: str
    machine: str
    base: Result | None

    def fits(self, where: dict[str, str], *, clean: bool = False) -> bool:
        """Is it a result of what a cell of the paper describes, whatever the attack; if ``clean``, and the budget?"""
        left_out = {"attack"} | ({"eps", "norm"} if clean else set())
        if Fraction(where["alpha"]) == 0:
            left_out |= {"sites", "centre"}
        return all(
            READ.get(key, str)(self.where[key]) == READ.get(key, str)(wanted)
            for key, wanted in where.items()
            if key not in left_out
        )

    def robust(self, where: dict[str, str]) -> Outcomes | None:
        """(n,) bool under the attack of a cell of the paper; None where that is not known of every example."""
        wanted = attacks_of(where["attack"])
        found = [attacks for attacks in self.broken if attacks <= wanted]
        if not found or frozenset().union(*found) != wanted:
            return None
        codes = np.stack([self.broken[attacks] for attacks in found], axis=1)
        robust: Outcomes = (codes != 1).all(1)
        return robust if not ((codes == -1).any(1) & robust).any() else None

    def find(self, measure: str, where: dict[str, str]) -> tuple[NDArray[np.int64], Outcomes] | None:
        """(examples, whether each is right): ``clean``, ``worst``, or else ``robust`` to the attack of ``where``."""
        found = self.clean if measure == "clean" else self.worst if measure == "worst" else self.robust(where)
        return None if found is None else (self.example, found)


@dataclass(frozen=True)
class RunResults:
    """All results of a run folder. ``training``: what the weights say about how they were trained, {} if nothing.

    ``commands``: what was typed to prepare it. ``calibrated``: the report behind its statistics.
    """

    folder: Path
    source: ModelSource
    training: dict[str, Any]
    results: tuple[Result, ...]
    commands: tuple[str, ...]
    calibrated: dict[str, Any]

    @property
    def model(self) -> str:
        """The model's name as people read it; a file of ``meansparse train`` by the folder it is in."""
        path = Path(self.source.name)
        if path.suffix != ".safetensors":
            return self.source.name
        return path.parent.name if path.stem == "model" else path.stem


def attacks_of(name: str) -> frozenset[str]:
    """The attacks that a name or a preset means.

    >>> sorted(attacks_of("apgd"))
    ['apgd-ce', 'apgd-dlr']
    """
    return frozenset(expand_attacks([name]))


def read_results(folder: Path) -> RunResults:
    """Every evaluation and measurement in ``folder``. Raises ArtifactError where a report or file is not whole."""
    from ..models.source import ModelSource, kind_of

    fetched, calibrated = (
        read_report(RunPaths(folder).report(stage), stage, mend=f"meansparse {stage} --run {folder} --model NAME")
        for stage in ("fetch", "calibrate")
    )
    source = ModelSource(**fetched["results"]["model"])
    rule, found = calibrated["results"].get("rule", "all"), list[Result]()
    for file in (file for pattern in PLACES for file in sorted(folder.glob(pattern))):
        if (report := _verified(file, folder)) is None:
            continue
        if other := _of_other_images(report, calibrated, source):
            log.info(f"left out: {file} was measured with {other}")
            continue
        found += _results(file, report, rule)
    typed = dict.fromkeys(report["provenance"]["command"] for report in (*_trained(source), fetched, calibrated))
    return RunResults(folder, source, kind_of(source).training(), tuple(found), tuple(typed), calibrated)


def _trained(source: ModelSource) -> list[dict[str, Any]]:
    """The report of `meansparse train` beside the weights, if they are still the ones it is about."""
    weights = Path(source.name)
    file = weights.with_name("train.yaml")
    if not (weights.is_file() and file.is_file()):
        return []
    report = read_report(file, "train", mend=f"the command that trained {file.parent}, with")
    return [report] if report["outputs"].get(weights.name) == sha256_of(weights) else []


def _verified(file: Path, folder: Path) -> dict[str, Any] | None:
    """The report, with the settings of the sweep that it evaluates; None where it is of other statistics."""
    stage = file.stem
    mend = stage_command(stage, folder, None if file.parent == folder else file.parent.name)
    report = read_report(file, stage, mend=mend)
    verify_outputs(report, file.parent, mend=mend)
    for upstream in ("calibrate", "sweep-alpha"):
        expected, used = report["inputs"].get(f"{upstream}.yaml"), RunPaths(folder).report(upstream)
        if expected is not None and (not used.exists() or expected != sha256_of(used)):
            log.info(f"left out: {file} was made from another {upstream}.yaml than the one in {folder}")
            return None
    if "sweep-alpha.yaml" in report["inputs"]:
        swept = read_report(RunPaths(folder).report("sweep-alpha"), "sweep-alpha", mend=mend)["config"]["settings"]
        report["config"]["settings"] |= {key: swept.get(key) for key in OF_THE_OPERATOR}
    return report


def _of_other_images(report: dict[str, Any], calibrated: dict[str, Any], source: ModelSource) -> str:
    """In what the images of a result differ in kind from those behind the statistics, in words; "" in nothing.

    A table's columns are about one data set, which no result of another may fill. What a measurement was not told it
    takes from calibrate.
    """
    mine, theirs = (held["config"]["settings"] for held in (report, calibrated))
    others = {"dataset": theirs.get("dataset") or source.dataset, "preprocessing": theirs.get("preprocessing")}
    differ = {key: other for key, other in others.items() if mine.get(key) not in (None, other)}
    return ", ".join(f"--{k} {mine[k]}, the statistics with {other or 'the default'}" for k, other in differ.items())


def _results(file: Path, report: dict[str, Any], calibrated_rule: str) -> list[Result]:
    """The results of a report; at an alpha above 0 those that can stand in a table of the paper."""
    settings, results = report["config"]["settings"], report["results"]
    default = {"split": "test", "centre": "channel-mean"}
    of_all = {key: settings.get(key, default.get(key)) for key in ("norm", "split", "centre")}
    found, base = list[Result](), None
    with np.load(file.with_name("outcomes.npz")) as arrays:
        example = arrays["index"]
        if "rows" in results:
            attacks, rows = (*results["attacks"], *results["bpda_attacks"]), list(_of_measurement(results, arrays))
        else:
            attacks = tuple(f"{name}" for name in arrays["name"] if name not in (CLEAN, TRANSFER))
            rows = list(_of_evaluation(settings, results, arrays))
    # one alpha for all sites, in each channel's own standard deviations: what every table of the paper has
    options = (
        settings.get("alpha_rule", "shared"),
        settings.get("spread", "channel-std"),
        settings.get("shape") or "hard",
    )
    is_the_papers = options == ("shared", "channel-std", "hard")
    for own, clean, worst, broken in rows:
        is_base = not own["alpha"]
        if is_base or is_the_papers:
            own |= {"alpha": f"{own['alpha']:g}", "sites": _rule(own["sites"], calibrated_rule)}
            before = None if is_base else base
            result = Result(file, of_all | own, example, clean, worst, broken, attacks, *_when(report), before)
            base = result if is_base else base
            found.append(result)
    return found


def _rule(sites: str, calibrated: str) -> str:
    """Site rules mean the calibrated sites: where those are not all of the model's, a rule relative to them keeps
    theirs in front, so that it fits no cell of the paper; ``single:N`` names a site itself.
    """
    if calibrated in ("all", "published") or sites.startswith("single:"):
        return sites
    return calibrated if sites == "all" else f"{calibrated} / {sites}"


def _of_evaluation(settings: dict[str, Any], results: dict[str, Any], arrays: Mapping[str, Any]) -> Iterator[_Row]:
    names = [str(name) for name in arrays["name"]]  # clean images come first
    attacks = [name for name in names if name not in (CLEAN, TRANSFER)]
    for model, alpha in zip(MODELS, (0.0, float(results["alpha"])), strict=True):
        codes = arrays[f"{model}_outcome"]  # (n, names): as in ``Result.broken``
        worst = (codes != 1).all(1) if any(is_bpda(name) for name in attacks) else None
        broken = {frozenset([a]): np.where(codes[:, 0] == 1, codes[:, 0], codes[:, names.index(a)]) for a in attacks}
        own = {"alpha": alpha, "eps": results.get("eps") or settings["eps"], "sites": settings.get("sites", "all")}
        if model == "base" or alpha:
            yield own, codes[:, 0] == 0, worst, broken


def _of_measurement(results: dict[str, Any], arrays: Mapping[str, Any]) -> Iterator[_Row]:
    """Every row; clean images alone where nothing was attacked."""
    attacks = frozenset(results["attacks"])
    clean, *attacked = (arrays[name] for name in ("clean", *(("plain", "worst") if attacks else ())))
    for i, row in enumerate(results["rows"]):
        plain, worst = (curve[i] for curve in attacked) if attacked else (None, None)
        own = {key: row[key] for key in ("alpha", "eps", "sites")}
        yield own, clean[i], worst, {} if plain is None else {attacks: (~plain).astype(np.int8)}


def _when(report: dict[str, Any]) -> tuple[str, str, str]:
    """Finished when, by which command, on what machine."""
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
        name, equals, value = word.partition("=") if "=/" in word or word.startswith("--") else ("", "", word)
        if i and words[i - 1] == "--data-dir":
            name, equals, value = "", "", "DIR"
        elif name == "--data-dir" and equals:
            value = "DIR"
        elif value.startswith("/"):
            value = "/".join(Path(value).parts[1:][-2:])
        words[i] = f"{name}{equals}{value}"
    return shlex.join(words)
