"""Attacks: the catalogue, and ``run_attack``, which runs any of them on a ``Problem``.

Importing this package does not import torch, so that ``--help`` can list the attacks at once.
"""

from typing import TYPE_CHECKING, Any

from .catalogue import ATTACKS, PRESETS, AttackSpec, expand_attacks, find_attack

if TYPE_CHECKING:
    from .problem import Problem
    from .runner import run_attack

__all__ = ["ATTACKS", "PRESETS", "AttackSpec", "Problem", "expand_attacks", "find_attack", "run_attack"]


def __getattr__(name: str) -> Any:
    if name == "Problem":
        from .problem import Problem

        return Problem
    if name == "run_attack":
        from .runner import run_attack

        return run_attack
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
