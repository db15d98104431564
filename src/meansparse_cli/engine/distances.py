"""How far a robust example is from one that is not: the smallest eps at which an attack breaks it.

A bisection for each example that withstood everything at the budget: twice the budget, four times, eight, then between
the largest eps it withstood and the smallest that broke it. An image that was found is drawn towards the clean one for
as long as it breaks, so that what it shows is often far below the eps of its attack.
"""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attacks.budget import distance, enforce_budget, per_image
from ..attacks.problem import Budget, Problem
from ..attacks.runner import run_attack
from ..data.examples import Examples
from ..ledger import Ledger, key_digest
from .cells import Cells, FoundImages
from .outcomes import ModelName, attack_version, run_order, tried_on

PARTS = 8
"""An eps is a multiple of an eighth of the budget."""
MOST = 8
"""Budgets: what withstands this is not searched further."""
NOWHERE = PARTS * MOST + 1
"""The level of an example that withstood the largest eps."""
HALVINGS = 10
"""Of the way from an adversarial image to the clean one."""


@dataclass
class _Known:
    """Of m examples: ``low`` (m,) levels withstood, ``high`` (m,) levels at which ``images`` (m, ...) break."""

    low: Tensor
    high: Tensor
    images: Tensor

    def next_levels(self, most: int) -> Tensor:
        """(m,) what to try next, ``most`` at most; 0 where the answer is known."""
        doubled = (2 * self.low).clamp(max=most)
        level = torch.where(self.high == NOWHERE, doubled, (self.low + self.high) // 2)
        return torch.where((self.high - self.low <= 1) | (level <= self.low), 0, level)


class Distances:
    """The search on ``examples``, kept in ``folder`` batch by batch; ``key``: what else it depends on."""

    def __init__(
        self, problem: Problem, examples: Examples, attacks: Sequence[str], folder: Path, key: dict[str, Any]
    ) -> None:
        self.cells, self.attacks = Cells(problem, examples), run_order(attacks)
        limit = 1.0 if problem.budget.norm == "Linf" else math.inf
        self.most = min(PARTS * MOST, math.floor(min(PARTS * limit / problem.budget.eps, PARTS * MOST)))
        versions = [(name, attack_version(name)) for name in self.attacks]
        about = {"norm": problem.budget.norm, "eps": problem.budget.eps, "seed": problem.seed, "parts": (PARTS, MOST)}
        self.ledger = Ledger(folder, {**key, **about, "attacks": versions}, on_change="beside")

    def of(
        self, name: ModelName, alpha: float, rows: Tensor, on_progress: Callable[[int], None]
    ) -> tuple[Tensor, FoundImages]:
        """The levels (m,) int64, ``NOWHERE`` at most, of examples at ``rows`` (m,) that are robust on ``name``.

        And the images inside the budget that were found on the way. ``on_progress`` is told how many more are known.
        """
        variant, levels, inside = self.cells.everywhere(alpha), [torch.zeros(0, dtype=torch.int64)], []
        for part in rows.split(self.cells.problem.batch_size) if len(rows) else ():
            state_name = f"{name}-{key_digest(self.cells.examples.indices[part].tolist())}"
            if (state := self.ledger.get(state_name)) is None:
                known = self._searched(name, variant, part, on_progress)
                close = known.high <= PARTS
                state = {"levels": known.high, "close": close, "images": known.images[close]}
                self.ledger.put(state_name, state)
            else:
                on_progress(len(part))
            levels.append(state["levels"])
            inside.append(FoundImages(part[state["close"]], state["images"]))
        blank = FoundImages(rows[:0], self.cells.examples.x[:0].cpu())
        found = FoundImages(*(torch.cat([getattr(f, of) for f in (blank, *inside)]) for of in ("rows", "images")))
        return torch.cat(levels), found

    def _searched(self, name: ModelName, variant: Tensor, rows: Tensor, on_progress: Callable[[int], None]) -> _Known:
        low = torch.full((len(rows),), PARTS)
        known = _Known(low, torch.full_like(low, NOWHERE), self.cells.examples.x[rows].cpu().clone())
        while (levels := known.next_levels(self.most)).any():
            for level in levels[levels > 0].unique().tolist():
                self._attack(name, variant, rows, known, (levels == level).nonzero().flatten(), level)
            on_progress(int((levels > 0).sum() - (known.next_levels(self.most) > 0).sum()))
        return known

    def _attack(self, name: ModelName, variant: Tensor, rows: Tensor, known: _Known, at: Tensor, level: int) -> None:
        """Every attack at ``level`` on the examples at positions ``at`` of ``rows``, each on what is left."""
        problem = self._problem(level)
        for attack in tried_on(name, self.attacks):
            if not len(at):
                break
            result = run_attack(attack, problem, self.cells.at(rows[at]), variant)
            broken = result.broken.cpu()
            found = FoundImages(rows[at[broken]], result.adversarial.detach().cpu()[broken])
            self._draw_in(variant, known, at[broken], found, level)
            at = at[~broken]
        known.low[at] = level

    def _draw_in(self, variant: Tensor, known: _Known, at: Tensor, found: FoundImages, level: int) -> None:
        """Halve the way between images that break and their clean ones; note the lowest level that still breaks."""
        if not len(at):
            return
        clean = self.cells.examples.x[found.rows].cpu()
        best, low, high = found.images, torch.zeros(len(at)), torch.ones(len(at))
        for _ in range(HALVINGS):
            share = (low + high) / 2
            image = clean + per_image(share) * (found.images - clean)
            breaks = self.cells.breaks(FoundImages(found.rows, image), variant)
            low, high = torch.where(breaks, low, share), torch.where(breaks, share, high)
            best = torch.where(per_image(breaks), image, best)
        norm, eps = self.cells.problem.budget.norm, self.cells.problem.budget.eps
        levels = (distance(best.double() - clean.double(), norm) / eps * PARTS).ceil().long().clamp(1, level)
        for one in levels.unique().tolist():  # judged as an attacker may use it: exactly inside its budget
            of_one = levels == one
            budget = self._problem(one).budget
            images = enforce_budget(best[of_one], clean[of_one], budget)
            breaks = self.cells.breaks(FoundImages(found.rows[of_one], images), variant)
            here = at[of_one]
            known.images[here] = torch.where(per_image(breaks), images, found.images[of_one])
            known.high[here] = torch.where(breaks, one, level)
        known.low[at] = torch.minimum(known.low[at], known.high[at] - 1)

    def _problem(self, level: int) -> Problem:
        problem = self.cells.problem
        return replace(problem, budget=Budget(problem.budget.norm, problem.budget.eps * level / PARTS))


QUANTILES = (10, 25, 50, 75, 90)
"""Per cent of the robust examples."""
Levels = dict[ModelName, tuple[Tensor, Tensor]]
"""Model -> the rows (m,) of its robust examples, and their levels (m,)."""


def distances_to_report(found: Levels, eps: float, most: int) -> dict[str, Any]:
    """The eps that a share of the robust examples of each model do not withstand; None: above all
    that was tried, up to the level ``most``.
    """
    report: dict[str, Any] = {"budget": eps, "step": eps / PARTS, "largest": eps * most / PARTS}
    for name, (_, levels) in found.items():
        ascending = [_eps_of(level, eps) for level in sorted(levels.tolist())]
        at = {q: ascending[math.ceil(q / 100 * len(ascending)) - 1] for q in QUANTILES if ascending}
        quantiles = {f"{q}": value if math.isfinite(value) else None for q, value in at.items()}
        n_beyond = int((levels == NOWHERE).sum())
        report[name] = {"n_robust": len(levels), "n_beyond": n_beyond, "quantiles": quantiles}
    return report


def distances_npz(found: Levels, examples: Examples, eps: float) -> bytes:
    """``index``, ``label`` and an eps for each model, all (n,): NaN: not robust at the budget, infinite: beyond."""
    arrays: dict[str, Any] = {"index": examples.indices.numpy(), "label": examples.y.cpu().numpy()}
    for name, (rows, levels) in found.items():
        arrays[name] = np.full(len(examples), np.nan)
        arrays[name][rows.numpy()] = [_eps_of(level, eps) for level in levels.tolist()]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def _eps_of(level: int, eps: float) -> float:
    return math.inf if level == NOWHERE else eps * level / PARTS
