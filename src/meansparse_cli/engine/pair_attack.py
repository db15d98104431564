"""One attack on (image, alphas) pairs: every row of a batch has alphas of its own, so all alphas share full batches.

A pair that is broken leaves at once and the next one, of whatever image and alphas, takes its place. The random start of
a pair depends on the seed, the attack and the image alone: all alphas of one image start at the same point, and the
trajectory of a pair is the one it would have by itself. A BPDA attack starts elsewhere than its plain twin: on the base
model the two are one attack, and from one start the base would face half of what the others face.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ..attacks import find_attack, run_attack
from ..attacks.budget import enforce_budget
from ..attacks.counting import CountedModel, device_of
from ..attacks.folding import N_PROBES, find_folds, folded
from ..attacks.judge import full_float32, under_attack
from ..attacks.precision import Precision, search_precision
from ..attacks.result import Budget
from ..attacks.run import SEARCHES
from ..attacks.task import AttackTask
from ..operator.sparsify import MeanSparse, SparsifiedModel, backward_rule, example_alphas_set

STREAMED = ("pgd", "apgd-ce", "apgd-dlr", "apgd-t", "square")
"""Searches whose batches carry the alphas of each row along; the others run alpha by alpha."""


@dataclass(frozen=True)
class PairSettings:
    """What the outcome of a pair depends on, beside the model, the image and the alphas; and the batch size."""

    budget: Budget
    seed: int
    batch_size: int
    n_classes: int
    precision: Precision | None = None
    """Of the search; None: as it is set around the call. Breaks are judged in float32."""


@dataclass(frozen=True)
class PairResult:
    """``broken`` (p,) bool on the CPU, judged afresh in float32; ``images`` (number broken, channels, height, width)."""

    broken: Tensor
    images: Tensor
    forward_passes: int
    backward_passes: int


def attack_pairs(
    name: str,
    model: SparsifiedModel,
    x: Tensor,
    y: Tensor,
    indices: Tensor,
    alphas: Tensor,
    settings: PairSettings,
    on_progress: Callable[[int], None] | None = None,
) -> PairResult:
    """Run attack ``name`` on p pairs: ``x`` (p, channels, height, width), ``y`` and ``indices`` (p,), ``alphas`` (p, n_sites).

    Every pair must be classified correctly at ``x``. Raises what ``run_attack`` raises.
    """
    spec = find_attack(name)
    if spec.search not in STREAMED:
        return _attack_column_by_column(name, model, x, y, indices, alphas, settings, on_progress)
    device = device_of(model, x.device)
    counted = CountedModel(model, n_classes=settings.n_classes, device=device, base_gradient=spec.backward == "base")
    rule = "true" if spec.backward == "base" else spec.backward
    broken = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    adversarial = x.clone(memory_format=torch.contiguous_format)
    rows = torch.arange(len(x), device=x.device)

    def forward(points: Tensor, batch: dict[str, Tensor]) -> Tensor:
        with example_alphas_set(model, batch["alphas"]):
            return counted(points)

    advance = on_progress or _no_progress
    with under_attack(model):
        clean_logits = pair_logits(counted, model, x, alphas, settings.batch_size)
        # as in run_attack: a break that the judge does not confirm is searched once more, in full precision
        folds = find_folds(model, x[:N_PROBES].to(device).contiguous()) if len(x) else []
        for precision, form in ((search_precision(device, settings.precision), folds), (full_float32(device), [])):
            if not len(rows):
                break
            task = AttackTask(
                attack=spec.name, model=counted, x=x[rows].contiguous(), y=y[rows], indices=indices[rows.cpu()],
                clean_logits=clean_logits[rows], budget=settings.budget, seed=settings.seed,
                batch_size=settings.batch_size, advance=advance, per_row={"alphas": alphas[rows.to(alphas.device)]},
                forward=forward,
            )  # fmt: skip
            with precision, folded(form), backward_rule(model, rule):
                outcome = SEARCHES[spec.search](task, **dict(spec.options))
            claimed = outcome.claimed.to(x.device)
            points = enforce_budget(outcome.points.to(x.device)[claimed], task.x[claimed], settings.budget)
            rows = rows[claimed]
            chosen = alphas[rows.to(alphas.device)]
            upheld = pair_logits(counted, model, points, chosen, settings.batch_size).argmax(1) != y[rows]
            adversarial[rows[upheld]], broken[rows[upheld]] = points[upheld], True
            rows, advance = rows[~upheld], _no_progress
    return PairResult(broken.cpu(), adversarial[broken].cpu(), counted.forward_passes, counted.backward_passes)


def pair_logits(
    counted: CountedModel, model: SparsifiedModel, images: Tensor, alphas: Tensor, batch_size: int
) -> Tensor:
    """Logits (p, n_classes) of ``images`` (p, ...) at ``alphas`` (p, n_sites): one forward pass each, full float32."""
    parts = [images.new_zeros(0, counted.n_classes)]
    with torch.no_grad(), full_float32(counted.device):
        for part, chosen in zip(images.split(batch_size), alphas.split(batch_size), strict=True):
            if len(part):
                with example_alphas_set(model, chosen):
                    parts.append(counted(part.to(counted.device).contiguous()).to(images.device))
    return torch.cat(parts)


@contextmanager
def site_alphas_set(model: SparsifiedModel, alphas: Tensor) -> Iterator[None]:
    """Give each site its own alpha for a while; ``alphas`` (n_sites,), in the order of ``model.sites``."""
    operators = [cast(MeanSparse, model.at(site)) for site in model.sites]
    before = [float(operator.alpha) for operator in operators]
    try:
        for operator, alpha in zip(operators, alphas.tolist(), strict=True):
            operator.set_alpha(alpha)
        yield
    finally:
        for operator, alpha in zip(operators, before, strict=True):
            operator.set_alpha(alpha)


def _attack_column_by_column(
    name: str, model: SparsifiedModel, x: Tensor, y: Tensor, indices: Tensor, alphas: Tensor, settings: PairSettings,
    on_progress: Callable[[int], None] | None,
) -> PairResult:  # fmt: skip
    broken, adversarial = torch.zeros(len(x), dtype=torch.bool), x.cpu().clone()
    n_forward = n_backward = 0
    for column in alphas.unique(dim=0):
        rows = (alphas == column).all(1).nonzero().flatten().to(x.device)
        with site_alphas_set(model, column):
            result = run_attack(
                name, model, x[rows], y[rows], indices[rows.cpu()], budget=settings.budget, seed=settings.seed,
                batch_size=settings.batch_size, n_classes=settings.n_classes, on_progress=on_progress,
                precision=settings.precision,
            )  # fmt: skip
        broken[rows.cpu()], adversarial[rows.cpu()] = result.broken.cpu(), result.adversarial.cpu()
        n_forward, n_backward = n_forward + result.forward_passes, n_backward + result.backward_passes
    return PairResult(broken, adversarial[broken], n_forward, n_backward)


def _no_progress(n_pairs: int) -> None:
    """Where nobody asked, or the pairs have been told already."""
