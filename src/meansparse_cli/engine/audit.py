"""``audit``: is a gain real? What ``evaluate`` asks of MeanSparse, asked in Python of any model and any defence."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..attacks.catalogue import expand_attacks
from ..attacks.problem import Budget, Problem
from ..data.examples import Examples
from ..errors import ConfigError
from ..operator.defence import DefendedModel, Surrogate, defend
from ..operator.device import device_of
from .comparison import Evaluation
from .evaluate import EvaluationRun, Plan
from .state import StateFolder

BATCH_SIZE = 64
DIFFERS = 1e-3
"""Of the largest logit: what two passes of one batch may differ by where nothing is random."""


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
