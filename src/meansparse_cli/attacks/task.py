"""What an attack family is given and hands back: the inside of ``run_attack``."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..data.examples import Examples
from .counting import CountedModel
from .problem import Problem


@dataclass(frozen=True)
class AttackTask:
    """n examples to attack, every one of them classified correctly at the clean image.

    ``attack``: what the random starts are drawn for. ``model``: the form of ``problem.model`` that is searched.
    ``clean_logits`` (n, n_classes). ``alphas`` (n, n_sites): each example's variant; None: the model as it stands.
    ``advance`` is called with the number of examples finished since its last call.
    """

    attack: str
    model: CountedModel
    problem: Problem
    examples: Examples
    clean_logits: Tensor
    alphas: Tensor | None = None
    advance: Callable[[int], None] = lambda n_examples: None


@dataclass(frozen=True)
class SearchOutcome:
    """What a search claims, before the judge has seen it.

    ``points`` (n, channels, height, width): the misclassified image where ``claimed`` (n,) is true, elsewhere the image
    of highest loss in the last attempt, or the clean one. ``passes`` (n, 2) int64 on the CPU: forward and backward
    passes spent on each example.
    """

    points: Tensor
    claimed: Tensor
    passes: Tensor
