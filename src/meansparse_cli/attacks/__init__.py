"""The catalogue of attacks: name -> what it is and costs, all called by ``run_attack`` with one result type.

Importing this package does not import torch, so that ``--help`` can list the attacks at once.
"""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .result import AttackResult, Budget

__all__ = ["ATTACKS", "PRESETS", "AttackSpec", "expand_attacks", "find_attack", "run_attack"]


@dataclass(frozen=True)
class AttackSpec:
    """One attack of the catalogue.

    ``search`` is the family that looks for adversarial images (``run.SEARCHES``); with ``straight_through`` its
    gradients pass through every MeanSparse operator as if it were the identity (BPDA). ``cost`` is that of an example
    that survives, in forward passes at 10 classes, a backward pass counted as two.
    """

    name: str
    description: str
    search: str
    cost: int
    straight_through: bool = False


_BPDA = "with gradients straight through MeanSparse (BPDA)"

ATTACKS: dict[str, AttackSpec] = {
    spec.name: spec
    for spec in (
        AttackSpec("pgd-50", "PGD on cross-entropy, 50 steps of 0.0078, 1 start; the paper's PGD-50", "pgd-50", 151),
        AttackSpec("apgd-ce", "APGD on cross-entropy, 100 steps, 1 start", "apgd-ce", 301),
        AttackSpec("bpda-apgd-ce", f"APGD on cross-entropy, 100 steps, 1 start, {_BPDA}", "apgd-ce", 301, True),
        AttackSpec("apgd-dlr", "APGD on the difference of logits ratio, 100 steps, 1 start", "apgd-dlr", 301),
        AttackSpec(
            "bpda-apgd-dlr",
            f"APGD on the difference of logits ratio, 100 steps, 1 start, {_BPDA}",
            "apgd-dlr",
            301,
            True,
        ),
        AttackSpec("apgd-t", "APGD on the targeted DLR, 100 steps for each of 9 target classes", "apgd-t", 2709),
        AttackSpec(
            "bpda-apgd-t",
            f"APGD on the targeted DLR, 100 steps for each of 9 target classes, {_BPDA}",
            "apgd-t",
            2709,
            True,
        ),
        AttackSpec("fab-t", "FAB (pyautoattack), 100 steps for each of 9 target classes", "fab-t", 3637),
        AttackSpec("square", "Square Attack (pyautoattack), black box, 5000 queries", "square", 5002),
    )
}
"""Every attack, cheapest first: the order in which they run, each on what the ones before have left."""

PRESETS: dict[str, tuple[str, ...]] = {
    "apgd": ("apgd-ce", "apgd-dlr"),
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),  # AutoAttack's standard version
    "autoattack": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "bpda": ("bpda-apgd-ce", "bpda-apgd-dlr"),
    "paper": ("apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square", "pgd-50"),
    "full": tuple(ATTACKS),
}
"""Names for sets of attacks."""


def find_attack(name: str) -> AttackSpec:
    """The attack called ``name``. Raises ``ConfigError``, naming the nearest ones, where there is none."""
    if name in ATTACKS:
        return ATTACKS[name]
    nearest = difflib.get_close_matches(name.lower(), [*ATTACKS, *PRESETS], n=3, cutoff=0.5)
    raise ConfigError(
        f"unknown attack {name!r}" + (f"; did you mean {' or '.join(nearest)}?" if nearest else ""),
        hint=f"Attacks: {', '.join(ATTACKS)}. Sets of attacks: {', '.join(PRESETS)}.",
    )


def expand_attacks(names: Iterable[str]) -> list[str]:
    """Names of attacks and presets -> names of attacks, each once, cheapest first.

    Raises ``ConfigError`` for an unknown name, with the nearest ones, and for no name at all.
    """
    wanted: set[str] = set()
    for name in names:
        wanted.update(PRESETS.get(name) or (find_attack(name).name,))
    if not wanted:
        raise ConfigError("no attack was named", hint=f"Attacks: {', '.join(ATTACKS)}.")
    return [name for name in ATTACKS if name in wanted]


def run_attack(
    name: str,
    model: "nn.Module",
    x: "Tensor",
    y: "Tensor",
    indices: "Tensor",
    *,
    budget: "Budget",
    seed: int,
    batch_size: int,
    n_classes: int,
    on_progress: Callable[[int], None] | None = None,
) -> "AttackResult":
    """Attack n examples and judge every break afresh.

    ``x`` (n, channels, height, width) float32 in [0, 1]; ``y`` (n,) true classes; ``indices`` (n,) the examples'
    positions in their data set, which fix their random starts. The images may be on another device than the model.
    Examples misclassified at ``x`` are broken as they are and cost one forward pass. ``on_progress`` is called with
    the number of examples finished since its last call; over a run these add up to n.

    Returns adversarial images inside ``budget`` and [0, 1], exactly, on the device of ``x``. An example counts as
    broken only if the returned image is misclassified in a forward pass of its own: float32, evaluation mode. The
    gradient attacks give each example the same result whatever ``batch_size``, the order, and the other examples, as
    far as the model's own outputs do; Square draws one sequence of squares a batch.

    Raises ``ConfigError`` (unknown attack, unusable budget), ``DataError`` (images or labels of the wrong kind) and
    ``AttackError`` (the model's outputs are not (n, n_classes) finite logits).
    """
    from .run import run_attack as run

    return run(
        name,
        model,
        x,
        y,
        indices,
        budget=budget,
        seed=seed,
        batch_size=batch_size,
        n_classes=n_classes,
        on_progress=on_progress,
    )
