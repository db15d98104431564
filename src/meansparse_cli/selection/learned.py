"""``--alpha-rule learned``: a threshold for each channel, by gradient, against attacks that see what is learned.

Nothing but thresholds is learned: the network's weights, means and deviations stay as they are. The forward pass is the
operator's own (paper, equation 5); the gradient, of thresholds and of the attack alike, is that of a band with a soft
edge. Training images teach; held-out images say which epoch is kept.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attacks.judge import under_attack
from ..attacks.problem import Problem
from ..attacks.runner import run_attack
from ..data.examples import Examples
from ..errors import ConfigError
from ..ledger import Decisions
from ..operator.checkpoint import Checkpoint, centred, sparsify
from ..operator.device import device_of
from ..operator.function import mean_sparsify, with_gradient_of
from ..operator.insertion import SparsifiedModel, insert, remove
from ..operator.module import MeanSparse
from ..sites.find import Site
from ..training.attack import LinfAscent, cross_entropy, uniform_start

N_IMAGES, N_EPOCHS, N_STEPS, BATCH_SIZE = 5000, 3, 7, 100
LEARNING_RATE = 0.02
EDGE = 0.1
"""Of the soft band, in standard deviations."""
LARGEST = 2.0
"""Standard deviations that a threshold may reach."""
EARLY_ATTACK = "soft-0.05-apgd-margin-30"

Alphas = list[list[float]]
"""The threshold of each channel of each active site, in standard deviations."""


class LearnedBand(MeanSparse):
    """The operator with ``alphas`` (channels,), thresholds in standard deviations that have a gradient."""

    def __init__(self, mean: Tensor, std: Tensor, channel_axis: int, alphas: Sequence[float]) -> None:
        super().__init__(mean, std, 1.0, channel_axis)
        self.alphas = nn.Parameter(torch.tensor(alphas, dtype=self.std.dtype))

    def forward(self, x: Tensor) -> Tensor:
        mean, _, std = self._at(x)
        threshold = self.alphas.view(std.shape) * std
        distance, edge = x - mean, (EDGE * std).clamp(min=torch.finfo(std.dtype).tiny ** 0.5)
        soft = mean + distance * torch.sigmoid((distance.abs() - threshold) / edge)
        return with_gradient_of(mean_sparsify(x.detach(), mean, threshold.detach()), soft)


@dataclass(frozen=True)
class Learned:
    """``checkpoint``: its alpha is the largest threshold; ``n_robust``: of the start, then after each epoch."""

    checkpoint: Checkpoint
    n_robust: list[int]
    kept: int
    alphas: Alphas

    @property
    def in_words(self) -> str:
        return f"epoch {self.kept} of {len(self.n_robust) - 1} was kept" if self.kept else "no epoch improved the start"

    def to_report(self, sites: Sequence[Site]) -> dict[str, Any]:
        ranges = {
            site.name: {"min": min(alphas), "mean": sum(alphas) / len(alphas), "max": max(alphas)}
            for site, alphas in zip(sites, self.alphas, strict=True)
        }
        return {"site_alphas": ranges, "n_robust": self.n_robust, "kept": self.kept}


@dataclass(frozen=True)
class Lesson:
    """What thresholds are learned on: ``problem``, whose model has the operators of ``checkpoint``; images, labels."""

    problem: Problem
    checkpoint: Checkpoint
    training: Examples
    early: Examples

    def learn(self, start: float, decisions: Decisions, on_progress: Callable[[int], None]) -> Learned:
        """From ``start`` everywhere; what ``decisions`` has of it is not computed again."""
        alphas: Alphas = [[start] * site.channels for site in self.checkpoint.active]
        robust = decisions.once("start", lambda: self._n_robust(alphas))
        best, counts, kept = alphas, [robust], 0
        for epoch in range(1, N_EPOCHS + 1):
            found = decisions.once(f"epoch {epoch}", lambda: self._epoch(epoch, alphas, on_progress))  # noqa: B023
            alphas = found["alphas"]
            if found["n_robust"] > max(counts):
                best, kept = alphas, epoch
            counts.append(found["n_robust"])
        return Learned(with_channel_alphas(self.checkpoint, best), counts, kept, best)

    def _epoch(self, epoch: int, alphas: Alphas, on_progress: Callable[[int], None]) -> dict[str, Any]:
        problem = self.problem
        device, generator = device_of(problem.model), torch.Generator().manual_seed(1000 * problem.seed + epoch)
        model = self._learning(alphas).to(device)
        bands = [cast(LearnedBand, model.at(site)) for site in model.sites]
        optimiser = torch.optim.Adam([band.alphas for band in bands], LEARNING_RATE)
        eps = problem.budget.eps
        ascent = LinfAscent(model, cross_entropy, eps, eps / 4, N_STEPS)
        for rows in torch.randperm(len(self.training), generator=generator).split(BATCH_SIZE):
            x, y = self.training.x[rows], self.training.y[rows].to(device)
            start = uniform_start(x, eps, generator).to(device)
            with under_attack(model):
                attacked = ascent(x.to(device), y, start)
            optimiser.zero_grad()
            F.cross_entropy(model(attacked), y).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            with torch.no_grad():
                for band in bands:
                    band.alphas.clamp_(0, LARGEST)
            on_progress(len(rows))
        learned = [[float(f"{alpha:.6g}") for alpha in band.alphas.tolist()] for band in bands]
        return {"alphas": learned, "n_robust": self._n_robust(learned)}

    def _learning(self, alphas: Alphas) -> SparsifiedModel:
        """A copy of the model with bands that learn; its own parameters are frozen."""
        base, checkpoint = self._base().requires_grad_(False), self.checkpoint
        statistics = dict(zip((site.index for site in checkpoint.sites), checkpoint.statistics, strict=True))
        bands = [
            LearnedBand(
                *centred(statistics[site.index], checkpoint.centre, checkpoint.spread), site.channel_axis, values
            )
            for site, values in zip(checkpoint.active, alphas, strict=True)
        ]
        return insert(base, checkpoint.active, bands).eval()

    def _n_robust(self, alphas: Alphas) -> int:
        """How many of the early-stopping images withstand a short attack on the operator with these thresholds."""
        problem = self.problem_of(with_channel_alphas(self.checkpoint, alphas))
        examples = self.early.to(str(device_of(problem.model)))
        return int((~run_attack(EARLY_ATTACK, problem, examples).broken).sum())

    def problem_of(self, checkpoint: Checkpoint) -> Problem:
        """The same problem for a copy of the model with the operators of ``checkpoint``, at its alpha."""
        return replace(self.problem, model=sparsify(self._base(), checkpoint))

    def _base(self) -> nn.Module:
        return remove(copy.deepcopy(cast(SparsifiedModel, self.problem.model)))


def check_learnable(norm: str, shape: str | None) -> None:
    """Refuse, before any work, what no threshold is learned for."""
    if norm != "Linf" or shape not in (None, "hard"):
        raise ConfigError(
            f"--alpha-rule learned under {norm} with shape {shape or 'hard'}: "
            "thresholds are learned under Linf, for the paper's operator",
            hint="leave --shape out and use --norm Linf, or another --alpha-rule",
        )


def with_channel_alphas(checkpoint: Checkpoint, alphas: Alphas) -> Checkpoint:
    """``checkpoint`` with a threshold for each channel: the largest is ``alpha``, the others are shares of it."""
    largest = max(max(values) for values in alphas)
    if largest == 0:
        return replace(checkpoint, alpha=0.0)
    shares = dict(zip((site.index for site in checkpoint.active), alphas, strict=True))
    weights = tuple(
        torch.tensor(shares.get(site.index, [0.0] * site.channels), dtype=torch.float64) / largest
        for site in checkpoint.sites
    )
    return replace(checkpoint, alpha=largest, channel_weights=weights)
