"""What an attack family is given and hands back: the inside of ``run_attack``."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .counting import CountedModel
from .result import Budget


@dataclass(frozen=True)
class AttackTask:
    """n examples to attack, every one of them classified correctly at the clean image.

    ``x`` (n, channels, height, width) float32 in [0, 1], on any device and in any memory format; ``y`` (n,) int64;
    ``indices`` (n,) int64 on the CPU, each example's position in its data set, from which its random starts are drawn;
    ``clean_logits`` (n, n_classes). ``advance`` is called with the number of examples finished since its last call.

    ``per_row`` holds whatever else belongs to each example, tensors of length n: attacks on the batch queue, and Square,
    carry them in their batches, where ``forward(images, batch)`` finds them; it stands in for ``model(images)`` there.
    """

    attack: str
    model: CountedModel
    x: Tensor
    y: Tensor
    indices: Tensor
    clean_logits: Tensor
    budget: Budget
    seed: int
    batch_size: int
    advance: Callable[[int], None]
    per_row: dict[str, Tensor] = field(default_factory=dict)
    forward: Callable[[Tensor, dict[str, Tensor]], Tensor] | None = None


@dataclass(frozen=True)
class SearchOutcome:
    """What a search claims, before the judge has seen it.

    ``points`` (n, channels, height, width): the misclassified image where ``claimed`` (n,) is true, elsewhere the image
    of highest loss in the last attempt, or the clean one. ``best_loss`` (n,): that loss, from attacks that climb one.
    ``passes`` (n, 2) int64 on the CPU: forward and backward passes spent on each example.
    """

    points: Tensor
    claimed: Tensor
    best_loss: Tensor | None = None
    passes: Tensor | None = None
