"""``meansparse compare``: evaluations of other runs, alphas, models or releases, paired on the examples they share.

Nothing is computed anew: each example's outcome is in ``outcomes.npz``, whose hash is in the report.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.outcomes import CLEAN, MODELS, PLAIN, ROWS, TRANSFER, WORST_CASE, is_bpda
from ..errors import ArtifactError, ConfigError
from ..files import sha256_of
from ..foreign import reading
from ..runs.report import RunPaths, read_report, stage_command
from ..stats.format import interval
from ..stats.paired import PairedDifference, accuracy_of, paired_difference
from .console import SafeConsole
from .table import Table
from .template import fill

FORMATS = ("table", "markdown", "json", "html")
SAME = ("eps", "norm", "split")
"""Settings that two evaluations have to share."""


@dataclass(frozen=True)
class Judged:
    """One model of one evaluation: ``right``, by name of ``ROWS``, (n,) bool, of the examples ``index``, ascending."""

    name: str
    command: str
    settings: dict[str, Any]
    images: str
    attacks: tuple[str, ...]
    index: NDArray[np.int64]
    labels: NDArray[np.int64]
    right: dict[str, NDArray[np.bool_]]


@dataclass(frozen=True)
class Paired:
    """``name`` minus the first evaluation in one of ``ROWS``, on the examples that both have."""

    name: str
    row: str
    first: float
    accuracy: float
    gain: PairedDifference

    def as_json(self) -> dict[str, Any]:
        """What a script needs."""
        return asdict(self) | {"gain": asdict(self.gain) | {"interval_95": self.gain.interval_95}}


def compare(texts: Sequence[str], format: str, *, width: int = 120) -> tuple[str, list[str]]:
    """The comparison in one of ``FORMATS``, ``table`` for a terminal, and what has to be said about it.

    ``texts``: folders of evaluations, each with ``:base`` behind it for the base model. Raises ConfigError for fewer
    than two, ArtifactError for evaluations that cannot be paired.
    """
    if len(texts) < 2 or format not in FORMATS:
        raise ConfigError(
            f"{len(texts)} evaluations, format {format!r}; expected two or more, and one of {', '.join(FORMATS)}",
            hint="meansparse compare runs/A runs/B; the base model of A: runs/A:base",
        )
    first, *others = everyone = [judged(text) for text in texts]
    found = [pair for other in others for pair in paired(first, other)]
    notes = [
        f"{other.name} faced {', '.join(other.attacks)}; {first.name} {', '.join(first.attacks)}"
        for other in others
        if other.attacks != first.attacks
    ]
    if format == "json":
        return json.dumps([pair.as_json() for pair in found], indent=1) + "\n", notes
    table = _table(first, found)
    if format == "markdown":
        return f"{table.title}:\n\n{table.to_markdown()}\n", notes
    if format == "html":
        facts = {"first": first, "judged": everyone, "notes": notes, "table": table, "chart": _chart(found)}
        return fill(__package__, "compare.html", is_html=True, **facts), notes
    console = SafeConsole(width=max(width, 80), highlight=False)
    with console.capture() as capture:
        console.print(table.to_rich())
    return capture.get(), notes


def judged(text: str) -> Judged:
    """The outcomes of one evaluation, once they are found to be those that its report was written with."""
    path, _, model = text.rpartition(":")
    if path and Path(path).is_dir() and not Path(text).is_dir() and model not in MODELS:
        raise ConfigError(f"{text}: no model {model!r}", hint=f"{path}:base, or {path} for the sparsified one")
    if Path(text).is_dir() or model not in MODELS:
        path, model = text, MODELS[-1]
    places = RunPaths(Path(path))
    report = read_report(places.report("evaluate"), "evaluate", mend=stage_command("evaluate", places.folder))
    if not places.outcomes.is_file() or sha256_of(places.outcomes) != report["outputs"].get(places.outcomes.name):
        raise ArtifactError(
            f"{places.outcomes} is not what {places.report('evaluate').name} was written with",
            hint=f"write both again, from what is kept: {stage_command('evaluate', places.folder)}",
        )
    with (
        reading(ArtifactError, f"{places.outcomes} cannot be read", "evaluate again"),
        np.load(places.outcomes) as file,
    ):
        names = [str(name) for name in file["name"]]
        outcome, worst = file[f"{model}_outcome"], file[f"{model}_first_broken_by"] < 0
        order = np.argsort(file["index"])
        is_plain = [name not in (CLEAN, TRANSFER) and not is_bpda(name) for name in names]
        right = {CLEAN: outcome[:, 0] == 0, WORST_CASE: worst}
        right[PLAIN] = right[CLEAN] & ~(outcome[:, is_plain] == 1).any(axis=1)
        return Judged(
            text,
            report["provenance"]["command"],
            report["config"]["settings"],
            report["inputs"].get("images", ""),
            tuple(name for name in names if name not in (CLEAN, TRANSFER)),
            file["index"][order],
            file["label"][order],
            {row: right[row][order] for row in ROWS},
        )


def paired(first: Judged, other: Judged) -> list[Paired]:
    """``other`` minus ``first`` in each row, on the examples that both have."""
    settings = [(key, first.settings.get(key), other.settings.get(key)) for key in SAME]
    differing = [f"{key} {mine} and {theirs}" for key, mine, theirs in settings if mine != theirs]
    shared, mine, theirs = np.intersect1d(first.index, other.index, return_indices=True)
    if not len(shared):
        differing.append("no example is in both")
    elif (first.labels[mine] != other.labels[theirs]).any():
        differing.append("the same examples have other labels: other images, or classes in another order")
    elif np.array_equal(first.index, other.index) and first.images != other.images:
        differing.append("the same examples are other images")
    if differing:
        raise ArtifactError(f"{first.name} and {other.name} cannot be paired: {'; '.join(differing)}")
    found = []
    for row in ROWS:
        a, b = first.right[row][mine], other.right[row][theirs]
        gain = paired_difference(b, a)
        found.append(Paired(other.name, row, accuracy_of(a).fraction, accuracy_of(b).fraction, gain))
    return found


def _chart(found: Sequence[Paired]) -> list[dict[str, Any]]:
    """The differences as the chart of gains takes them; of several evaluations, with what tells their names apart."""
    short = _short({pair.name for pair in found})
    return [
        {
            "name": f"{short[pair.name]}, {pair.row}" if len(short) > 1 else pair.row,
            "sparsified_minus_base": pair.gain.difference,
            "sparsified_minus_base_interval_95": list(pair.gain.interval_95),
        }
        for pair in found
    ]


def _short(names: set[str]) -> dict[str, str]:
    """Name -> as many of its last parts as tell it from the others."""
    for n in range(1, max(name.count("/") for name in names) + 2):
        short = {name: "/".join(name.split("/")[-n:]) for name in names}
        if len(set(short.values())) == len(names):
            break
    return short


def _table(first: Judged, found: Sequence[Paired]) -> Table:
    columns = {
        "": [pair.row for pair in found],
        "evaluation": [pair.name for pair in found],
        "%": [f"{100 * pair.accuracy:.2f}" for pair in found],
        "first %": [f"{100 * pair.first:.2f}" for pair in found],
        "difference": [str(pair.gain) for pair in found],
        "95 % interval": [interval(*pair.gain.interval_95, digits=1) for pair in found],
        "won/lost": [f"{pair.gain.gained}/{pair.gain.lost}" for pair in found],
        "n": [f"{pair.gain.n:,}" for pair in found],
    }
    strong = frozenset(i for i, pair in enumerate(found) if pair.row == WORST_CASE)
    return Table.of(
        f"Minus {first.name}, in points, on the examples that both have", columns, strong=strong, kinds="tfnnnnnn"
    )
