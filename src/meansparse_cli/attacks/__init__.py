"""Attacks: the catalogue, and ``runner.run_attack``, which runs any of them on a ``Problem``.

catalogue                     every attack by name: what it searches with, what it costs
problem                       the model and the budget that every attack is given, the outcome that it returns
runner                        clean images, the search (again in float32 where a break is none), the judge
judge                         is an image misclassified, in float32, by the model as it is; the model as it is searched
folding                       batch norms folded while a search runs
queue                         keeps the batch of a search full; each attack is a rule of it:
ascent, apgd, pgd, adaptive   gradients of a loss
fab; square                   the boundary; a black box
losses, targets               losses to climb; the classes that are aimed at
budget                        distances, projections and random starts in the ball of a budget

Importing this package does not import torch, so that ``--help`` can list the attacks at once. How to add one:
``docs/development/adding-an-attack.md``.
"""

from .catalogue import ATTACKS, PRESETS, AttackSpec, expand_attacks, find_attack

__all__ = ["ATTACKS", "PRESETS", "AttackSpec", "expand_attacks", "find_attack"]
