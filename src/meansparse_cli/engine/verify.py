"""``meansparse verify``: images from anywhere against the true test images; nothing in their file is believed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attacks.budget import ROUNDING, compliance, per_image
from ..attacks.judge import judge
from ..attacks.problem import Problem
from ..data.examples import Examples
from ..ledger import Ledger
from ..operator.active import alpha_set
from ..operator.insertion import SparsifiedModel
from ..stats.paired import Accuracy, accuracy_of
from .image_files import MatchedImages
from .outcomes import ModelName, each_model

KIND = "judged"
Findings = dict[str, Tensor]
"""Columns of one length, a row an evaluated example: ``has_image``; of its image ``finite``, ``in_range``, ``near`` and
``distance``; ``MODEL.correct`` at the clean image, and ``MODEL.withstood`` the one of the file."""


@dataclass(frozen=True)
class Judgement:
    """The findings about m images; ``n_unchanged`` of them are the clean ones, and show nothing.

    ``robust``: of the n evaluated examples, those correct at the clean image and at theirs.
    """

    name: str
    n_images: int
    n_evaluated: int
    n_unchanged: int
    n_not_finite: int
    n_outside_range: int
    n_outside_budget: int
    largest_distance: float
    n_misclassified: dict[ModelName, int]
    clean: dict[ModelName, Accuracy]
    robust: dict[ModelName, Accuracy]

    @property
    def is_admissible(self) -> bool:
        """Every image is one that an attacker may use."""
        return self.n_not_finite + self.n_outside_range + self.n_outside_budget == 0

    def to_report(self) -> dict[str, Any]:
        row: dict[str, Any] = {key: value for key, value in vars(self).items() if not isinstance(value, dict)}
        for model, robust in self.robust.items():
            row[model] = {
                "n_misclassified": self.n_misclassified[model],
                "clean_accuracy": self.clean[model].fraction,
                "robust_accuracy": robust.fraction,
                "robust_standard_error": robust.standard_error,
            }
        return row


def judge_images(given: MatchedImages, rows: Tensor, examples: Examples, problem: Problem, alpha: float) -> Findings:
    """Check the images of some of the examples that ``given`` is of: ``rows`` (m,), of which are ``examples``.

    By a sparsified model at 0 and at ``alpha``, or a base one. An image that breaks the rules shows nothing: its
    example counts as if it had none.
    """
    places = given.image_of[rows]
    has_image = places >= 0
    images, clean = given.images[places[has_image]], examples.x[has_image]
    kept = compliance(images, clean, problem.budget, slack=ROUNDING[problem.budget.norm])
    shown = examples.x.clone()
    shown[has_image] = torch.where(per_image(kept.allowed), images, clean)

    found: Findings = {"has_image": has_image, "distance": torch.zeros(len(rows), dtype=torch.float64)}
    found |= {rule: torch.ones_like(has_image) for rule in ("finite", "in_range", "near")}
    for column in found.keys() - {"has_image"}:
        found[column][has_image] = getattr(kept, column)
    for name, value in each_model(alpha if isinstance(problem.model, SparsifiedModel) else 0.0).items():
        with alpha_set(problem.model, value):
            for column, batch in (("correct", examples.x), ("withstood", shown)):
                found[f"{name}.{column}"] = ~judge(problem, batch, examples.y)
    return found


def judgement_of(name: str, found: Findings) -> Judgement:
    """What a set of images amounts to, once all of its examples have been looked at."""
    has_image, finite = found["has_image"], found["finite"]
    allowed = finite & found["in_range"] & found["near"]
    models: list[ModelName] = [model for model in ("base", "sparsified") if f"{model}.correct" in found]
    withstood = {model: found[f"{model}.withstood"] for model in models}
    return Judgement(
        name=name,
        n_images=int(has_image.sum()),
        n_evaluated=len(has_image),
        n_unchanged=int((found["distance"][has_image & finite] == 0).sum()),
        n_not_finite=int((~finite).sum()),
        n_outside_range=int((~found["in_range"]).sum()),
        n_outside_budget=int((~found["near"]).sum()),
        largest_distance=float(found["distance"].max()),
        n_misclassified={model: int((~withstood[model] & has_image & allowed).sum()) for model in models},
        clean={model: accuracy_of(found[f"{model}.correct"]) for model in models},
        robust={model: accuracy_of(found[f"{model}.correct"] & withstood[model]) for model in models},
    )


class JudgedSets:
    """The examples of several sets of images, numbered set after set; in ``ledger`` what anybody found about them."""

    def __init__(self, ledger: Ledger, sets: Sequence[MatchedImages]) -> None:
        self.ledger, self.sets = ledger, sets
        self.first = torch.tensor([0, *(len(given.evaluated) for given in sets)]).cumsum(0).tolist()
        self._found: list[list[Findings]] = [[] for _ in sets]
        self._done = torch.zeros(self.first[-1], dtype=torch.bool)
        for _, piece in ledger.pieces(KIND):
            self._take(piece["set"], piece["rows"], piece["found"])

    def __len__(self) -> int:
        return len(self._done)

    def missing(self, among: Sequence[int] | None = None) -> list[int]:
        """The examples about which nothing is known, ascending; of all, or ``among`` these."""
        return [i for i in (range(len(self)) if among is None else among) if not self._done[i]]

    def in_set(self, k: int, examples: Sequence[int], size: int) -> list[Tensor]:
        """Those of ``examples`` that are of set ``k``, as rows of it, at most ``size`` at a time."""
        own = [i - self.first[k] for i in examples if self.first[k] <= i < self.first[k + 1]]
        return [torch.tensor(own[start : start + size]) for start in range(0, len(own), size)]

    def add(self, k: int, rows: Tensor, found: Findings) -> None:
        """Keep what was found about some examples of set ``k``."""
        self.ledger.append(KIND, {"set": k, "rows": rows, "found": found})
        self._take(k, rows, found)

    def judgements(self) -> list[Judgement]:
        """One a set, once nothing is missing."""
        joined = [{column: torch.cat([part[column] for part in parts]) for column in parts[0]} for parts in self._found]
        return [judgement_of(given.name, found) for given, found in zip(self.sets, joined, strict=True)]

    def _take(self, k: int, rows: Tensor, found: Findings) -> None:
        """Of an example that two have looked at, the first counts."""
        there = rows + self.first[k]
        new = ~self._done[there]
        self._found[k].append({column: values[new] for column, values in found.items()})
        self._done[there] = True
