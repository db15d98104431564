"""Steps along the gradient whose size is known beforehand: PGD with a fixed one (Madry et al. 2018), the attack of
the MeanSparse paper's tables 5 and 12; or one that shrinks along a cosine.
"""

import math

import torch

from .ascent import Ascent
from .budget import per_image, uniform_start
from .losses import LossName, choose_loss, cross_entropy
from .problem import Problem
from .queue import Batch

N_STEPS = 50
PAPER_STEP_SIZE = 0.0078  # Linf, in pixel units: the reference code's value for 50 steps
STEP_SIZE = 2 / 255  # for any other number of steps


class PGDRule(Ascent):
    """PGD on cross-entropy from one start, uniform in the ball; ``n_steps`` defaults to ``N_STEPS``.

    ``step_size``, in pixel units, defaults to the constants above for Linf and to 2.5 eps / n_steps for L2.
    """

    def __init__(self, problem: Problem, *, n_steps: int | None = None, step_size: float | None = None) -> None:
        budget, n_steps = problem.budget, n_steps or N_STEPS
        super().__init__(budget, cross_entropy, uniform_start, n_steps)
        linf_size = PAPER_STEP_SIZE if n_steps == N_STEPS else STEP_SIZE
        default = linf_size if budget.norm == "Linf" else 2.5 * budget.eps / n_steps
        self.step_size = default if step_size is None else step_size

    def move(self, batch: Batch) -> None:
        self.step_along(batch, self.step_size)


class CosineRule(Ascent):
    """Sign steps that shrink along a cosine: for examples that APGD comes close to and does not break.

    APGD halves its step where the loss does not rise; behind a kinked operator it may do so too soon. Here the step
    follows a schedule alone (the cosine is that of Loshchilov & Hutter 2017, arXiv 1608.03983). ``n_attempts`` starts,
    uniform in the ball, of ``n_steps`` steps each; step k has size eps (1 + cos(pi k / n_steps)).
    """

    def __init__(self, problem: Problem, *, loss: LossName, n_steps: int, n_attempts: int) -> None:
        super().__init__(problem.budget, choose_loss(loss, problem.n_classes), uniform_start, n_steps)
        self.n_attempts = n_attempts

    def move(self, batch: Batch) -> None:
        size = self.budget.eps * (1 + torch.cos(math.pi * batch["step"] / self.n_steps))
        self.step_along(batch, per_image(size))
