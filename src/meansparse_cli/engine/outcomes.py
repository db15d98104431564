"""Outcomes of every example on one model: masks, from which every number is derived; names and groups of attacks."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..attacks import PRESETS, find_attack

ModelName = Literal["base", "sparsified"]
MODELS: tuple[ModelName, ModelName] = ("base", "sparsified")
ATTACKS_VERSION = 2
"""Raised when an attack of the catalogue finds other images than before."""
CLEAN, PLAIN, TRANSFER, WORST_CASE = "clean", "plain attacks", "transfer", "worst case"
ROWS = (CLEAN, PLAIN, WORST_CASE)
"""What two evaluations are compared by."""


def each_model(alpha: float) -> dict[ModelName, float]:
    """The alpha of each model that is attacked: at alpha = 0 the two are one."""
    return {"base": 0.0, "sparsified": alpha} if alpha else {"base": 0.0}


@dataclass(frozen=True)
class Spent:
    """The cost of an attack on one model, over every session that worked on it; passes are counted in examples.

    ``rejected``: breaks refused by the judge. ``unconfirmed``: breaks that an earlier session kept and that do not hold
    when they are judged again. ``n_attacked`` examples were searched, not taken over from a smaller eps,
    ``n_attacked_broken`` of them broken, with ``*_passes_broken`` of the passes.
    """

    forward_passes: int = 0
    backward_passes: int = 0
    seconds: float = 0.0
    rejected: int = 0
    unconfirmed: int = 0
    n_attacked: int = 0
    n_attacked_broken: int = 0
    forward_passes_broken: int = 0
    backward_passes_broken: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class ModelOutcomes:
    """The outcomes of n examples on one model; every array is (n,) bool.

    ``correct``: correct at the clean image. Per attack, ``transfer`` included, ``faced``: the attack was tried on the
    example; ``broken``: it found an image that is misclassified, inside the budget.
    """

    correct: NDArray[np.bool_]
    faced: dict[str, NDArray[np.bool_]]
    broken: dict[str, NDArray[np.bool_]]
    spent: dict[str, Spent]

    def robust_to(self, attacks: Iterable[str]) -> NDArray[np.bool_] | None:
        """(n,) bool: correct at the clean image and under each of ``attacks``.

        None where that is not known: an attack of a cascade is not tried on the examples that others broke before it.
        """
        robust, known = self.correct.copy(), np.ones_like(self.correct)
        for attack in attacks:
            robust &= ~self.broken[attack]
            known &= self.faced[attack]
        return robust if (known | ~robust).all() else None


def is_bpda(attack: str) -> bool:
    return attack != TRANSFER and find_attack(attack).is_bpda


def twin_on_base(attack: str) -> str:
    """The attack that ``attack`` repeats on the base model, where no backward rule is at work; else ``""``."""
    return find_attack(attack).start_of if is_bpda(attack) else ""


def tried_on(name: ModelName, attacks: Sequence[str]) -> list[str]:
    """Those of ``attacks`` that are no repetition on this model: on the base one a twin is its plain attack."""
    return [attack for attack in attacks if not (name == "base" and twin_on_base(attack) in attacks)]


def run_order(attacks: Iterable[str]) -> tuple[str, ...]:
    """AutoAttack's own first and in its order, then the other plain ones, BPDA last: each worst case becomes known."""
    wanted = list(dict.fromkeys(attacks))
    standard = [name for name in PRESETS["standard"] if name in wanted]
    plain = [name for name in wanted if name not in standard and not is_bpda(name)]
    return (*standard, *plain, *(name for name in wanted if is_bpda(name)))


def attack_groups(attacks: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Groups of attacks worth a number of their own, ``clean`` first and ``worst case`` last."""
    plain = tuple(name for name in attacks if not is_bpda(name))
    bpda = tuple(name for name in attacks if is_bpda(name))
    presets = {name: PRESETS[name] for name in ("apgd", "autoattack") if set(PRESETS[name]) <= set(attacks)}
    groups: dict[str, tuple[str, ...]] = {CLEAN: ()}
    groups |= {name: (name,) for name in plain} | presets | ({PLAIN: plain} if plain else {})
    groups |= {name: (name,) for name in bpda} | ({"bpda": bpda} if bpda else {})
    return groups | {TRANSFER: (TRANSFER,), WORST_CASE: (*attacks, TRANSFER)}


def attack_version(attack: str) -> str:
    """A description of the attack that changes when it does."""
    if attack == TRANSFER:
        return "every image found on one model, tried on the other; those of a pool and of the doubts, on both"
    return f"{find_attack(attack).description}; meansparse's own, version {ATTACKS_VERSION}"


def attacks_id(attacks: Iterable[str]) -> str:
    """A digest of what the attacks are: another one when a release changes an attack, or what a preset holds."""
    return hashlib.sha256("\n".join(f"{name}: {attack_version(name)}" for name in attacks).encode()).hexdigest()
