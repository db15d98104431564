"""``meansparse verify``: images from anywhere against the true test images; nothing in their file is believed."""

from dataclasses import dataclass
from typing import Any

import torch

from ..attacks.budget import ROUNDING, compliance, per_image
from ..attacks.judge import judge
from ..attacks.problem import Problem
from ..data.examples import Examples
from ..operator.active import alpha_set
from ..operator.insertion import SparsifiedModel
from ..stats.paired import Accuracy, accuracy_of
from .image_files import MatchedImages
from .outcomes import ModelName, each_model


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


def judge_images(given: MatchedImages, examples: Examples, problem: Problem, alpha: float) -> Judgement:
    """Check ``given`` against the n examples that it is of, by a sparsified model at 0 and at ``alpha``, or a base one.

    An image that breaks the rules shows nothing: its example counts as if it had none.
    """
    images, clean, budget = given.images, examples.x[given.rows], problem.budget
    kept = compliance(images, clean, budget, slack=ROUNDING[budget.norm])
    shown = examples.x.clone()
    shown[given.rows] = torch.where(per_image(kept.allowed), images, clean)

    n_misclassified, accuracy, robust = {}, {}, {}
    for name, value in each_model(alpha if isinstance(problem.model, SparsifiedModel) else 0.0).items():
        with alpha_set(problem.model, value):
            correct, withstood = (~judge(problem, batch, examples.y) for batch in (examples.x, shown))
        n_misclassified[name] = int((~withstood[given.rows] & kept.allowed).sum())
        accuracy[name], robust[name] = accuracy_of(correct), accuracy_of(correct & withstood)
    return Judgement(
        name=given.name,
        n_images=len(images),
        n_evaluated=len(examples),
        n_unchanged=int((kept.distance[kept.finite] == 0).sum()),
        n_not_finite=int((~kept.finite).sum()),
        n_outside_range=int((~kept.in_range).sum()),
        n_outside_budget=int((~kept.near).sum()),
        largest_distance=float(kept.distance.max()) if len(images) else 0.0,
        n_misclassified=n_misclassified,
        clean=accuracy,
        robust=robust,
    )
