"""For notebooks: ``calibrate``, ``sparsify``, ``evaluate``, ``compare`` on modules and tensors; and ``audit``.

``audit`` asks of any model and any defence what ``meansparse evaluate`` asks of MeanSparse: is a gain real?
"""

import copy
import hashlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ..attacks.catalogue import expand_attacks
from ..attacks.problem import Budget, Problem
from ..data.examples import Examples
from ..errors import ConfigError, DataError
from ..operator import checkpoint
from ..operator.active import operators_of
from ..operator.calibration import ChannelObserver, add_batch, observed
from ..operator.checkpoint import Checkpoint
from ..operator.defence import DefendedModel, Surrogate, defend
from ..operator.device import device_of
from ..operator.insertion import SparsifiedModel
from ..operator.statistics import compute
from ..sites.find import find_sites
from ..sites.rules import select_sites
from ..stats.paired import PairedDifference, paired_difference
from .comparison import Evaluation
from .evaluate import EvaluationRun, Plan
from .outcomes import ROWS
from .state import StateFolder

Batch = Tensor | Sequence[Tensor]
BATCH_SIZE = 64
DIFFERS = 1e-3
"""Of the largest logit: what two passes of one batch may differ by where nothing is random."""


def calibrate(model: nn.Module, loader: Iterable[Batch], *, sites: str = "all") -> Checkpoint:
    """Channel means and standard deviations at the activations of ``model``, over one pass of ``loader``.

    A batch is images (n, channels, height, width) in [0, 1], or begins with them. ``sites``: as ``--sites`` takes it.
    Equations 2 and 3 of the paper, pooled over all images. Raises DataError for no batch, SiteError and StatisticsError
    as ``meansparse calibrate`` does.
    """
    batches, device = iter(loader), device_of(model)
    first = next(batches, None)
    if first is None:
        raise DataError("the loader holds no batch", hint="one that was gone through before has to be made anew")
    chosen = select_sites(find_sites(model, _images(first)[:4].to(device)), sites)
    with observed(model, chosen, "pooled") as wrapper:
        observers = [cast(ChannelObserver, wrapper.at(site)) for site in chosen]
        for batch in chain([first], batches):
            add_batch(wrapper, observers, _images(batch).to(device))
    statistics = tuple(compute(observer.sums, observer.site.name) for observer in observers)
    return Checkpoint(tuple(chosen), statistics, "pooled", rule=sites)


def sparsify(model: nn.Module, statistics: Checkpoint, alpha: float) -> SparsifiedModel:
    """A copy of ``model`` with the operator (equation 5) in front of each activation, in evaluation mode.

    ``alpha`` in standard deviations of a channel; 0 is the model itself, bit by bit.
    """
    return checkpoint.sparsify(copy.deepcopy(model), statistics, alpha=alpha)


def evaluate(
    model: SparsifiedModel,
    x: Tensor,
    y: Tensor,
    *,
    budget: Budget,
    attacks: Sequence[str] = ("fast",),
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> Evaluation:
    """``model``, of ``sparsify``, and its base model under the same attacks on the same images, judged afresh.

    ``x`` (n, channels, height, width) float32 in [0, 1], ``y`` (n,) labels; ``attacks`` as ``--attack`` takes them. The
    outcome has ``verdict``, ``comparisons`` and, of each model, ``outcomes``. Raises ConfigError for an unknown attack,
    or a model whose sites have several alphas; DataError for images of another kind.
    """
    alphas = {operator.shared_alpha for operator in operators_of(model)}
    if len(alphas) != 1:
        raise ConfigError(f"{len(alphas)} alphas in this model; expected one at all sites", hint="sparsify(model, ...)")
    with torch.no_grad():
        n_classes = model(x[:2].to(device_of(model, x.device))).shape[1]
    found = attacked(Problem(model, budget, n_classes, seed, batch_size, "fp32"), x, y, attacks, alphas.pop())
    return replace(found, about=f"{budget} {hashlib.sha256(x.detach().cpu().numpy().tobytes()).hexdigest()}")


def compare(first: Evaluation, other: Evaluation) -> dict[str, PairedDifference]:
    """``other`` minus ``first``, their sparsified models: clean, under the plain attacks, in the worst case.

    Each over the attacks that it was given; what only one of them was given is left out. Raises DataError where the
    two, of ``evaluate``, are not of the same images, in the same order, at the same budget.
    """
    if first.about != other.about or not np.array_equal(first.labels, other.labels):
        hint = "give both the same x, y and budget"
        raise DataError("the two evaluations are of other images, or of another budget", hint=hint)
    found = {}
    for row in ROWS:
        ours, theirs = (one.robust("sparsified", row) for one in (first, other))
        if ours is not None and theirs is not None:
            found[row] = paired_difference(theirs, ours)
    return found


def audit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    defence: str | Mapping[str, Surrogate | None] = "",
    *,
    budget: Budget,
    base: nn.Module | None = None,
    attacks: Sequence[str] = ("fast",),
    n_draws: int = 1,
) -> Evaluation:
    """``model`` with and without its defence under the same attacks, judged afresh; ``.verdict`` says what it is worth.

    ``x`` (n, channels, height, width) float32 in [0, 1], ``y`` (n,) labels; ``model`` gives logits (n, n_classes).
    ``defence``: a pattern of the names of its modules, or pattern -> surrogate: a function of a module's input that an
    attack differentiates in its place (BPDA); None: identity. ``base``: the model to compare with, by default ``model``
    with these modules replaced by identity. ``n_draws``: for a random defence, passes that each prediction and each
    gradient averages (EOT, Athalye et al. 2018). In the outcome ``sparsified`` is the model with its defence.

    Raises ConfigError for a pattern that matches no module, and for a defence that is random with one draw; SiteError
    for a surrogate of another shape, or a defence that changes the batch.

    >>> audit(model, x, y, "quantise", budget=Budget("Linf", 8 / 255)).verdict.name  # doctest: +SKIP
    'gradient masking'
    """
    patterns = defence if isinstance(defence, Mapping) else {defence: None} if defence else {}
    defended = defend(model, patterns, base=base, n_draws=n_draws)
    device = device_of(defended, x.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        n_classes = check_draws(defended, x[:BATCH_SIZE].to(device))
        problem = Problem(defended, budget, n_classes, 0, BATCH_SIZE, "fp32")
        return attacked(problem, x, y, attacks, 1.0)


def attacked(problem: Problem, x: Tensor, y: Tensor, attacks: Sequence[str], alpha: float) -> Evaluation:
    """Both models of ``problem`` under ``attacks``; nothing is kept on disk."""
    plan, examples = Plan(tuple(expand_attacks(attacks)), alpha), Examples(x, y, torch.arange(len(x)))
    with tempfile.TemporaryDirectory() as kept:
        return EvaluationRun(problem, examples, plan, StateFolder(Path(kept), {})).attack()


@torch.no_grad()
def check_draws(defended: DefendedModel, x: Tensor) -> int:
    """The number of classes; ConfigError where the defence is random though one draw is to stand for it."""
    once, again = defended(x), defended(x)
    if defended.n_draws == 1 and (once - again).abs().max() > DIFFERS * once.abs().max():
        raise ConfigError(
            f"the defence is random: two passes of the same images differ by {float((once - again).abs().max()):.2g}",
            hint="average some draws: --draws 16 (in Python: n_draws=16)",
        )
    return int(once.shape[1])


def _images(batch: Batch) -> Tensor:
    return batch if isinstance(batch, Tensor) else batch[0]
