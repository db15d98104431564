"""PGD with a fixed step (Madry et al. 2018): the attack of the MeanSparse paper's tables 5 and 12."""

import torch

from .ascent import Ascent
from .budget import project_l2, unit_l2
from .losses import cross_entropy
from .problem import Problem
from .queue import Batch
from .starts import uniform_start

N_STEPS = 50
PAPER_STEP_SIZE = 0.0078  # Linf, in pixel units: the reference code's value for 50 steps
STEP_SIZE = 2 / 255  # for any other number of steps


class PGDRule(Ascent):
    """PGD on cross-entropy from one start, uniform in the ball.

    x <- projection(x + step_size * sign(gradient)), or the unit gradient for L2. ``n_steps`` defaults to ``N_STEPS``;
    ``step_size``, in pixel units, to the constants above for Linf and to 2.5 eps / n_steps for L2.
    """

    def __init__(self, problem: Problem, *, n_steps: int | None = None, step_size: float | None = None) -> None:
        budget, n_steps = problem.budget, n_steps or N_STEPS
        super().__init__(budget, cross_entropy, uniform_start, n_steps)
        linf_size = PAPER_STEP_SIZE if n_steps == N_STEPS else STEP_SIZE
        default = linf_size if budget.norm == "Linf" else 2.5 * budget.eps / n_steps
        self.step_size = default if step_size is None else step_size

    def move(self, batch: Batch) -> None:
        del batch["loss"]
        x, grad, eps = batch["x"], batch.pop("grad"), self.budget.eps
        if self.budget.norm == "Linf":
            moved = batch["point"] + self.step_size * grad.sign()
            batch["point"] = torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0.0, 1.0)
        else:
            batch["point"] = project_l2(batch["point"] + self.step_size * unit_l2(grad), x, eps)
