"""Sign steps that shrink along a cosine, from several starts: for examples that APGD comes close to and does not break.

APGD halves its step where the loss does not rise; behind a kinked operator it may do so too soon. Here the step follows
a schedule alone, from 2 eps to 0 (the cosine is that of Loshchilov & Hutter 2017, arXiv 1608.03983).
"""

import math

import torch

from .ascent import Ascent
from .budget import per_image, project_l2, unit_l2
from .losses import LossName, choose_loss
from .problem import Problem
from .queue import Batch
from .starts import uniform_start


class CosineRule(Ascent):
    """``n_attempts`` starts, uniform in the ball, of ``n_steps`` steps each.

    Step k has size eps (1 + cos(pi k / n_steps)).
    """

    def __init__(self, problem: Problem, *, loss: LossName, n_steps: int, n_attempts: int) -> None:
        super().__init__(problem.budget, choose_loss(loss, problem.n_classes), uniform_start, n_steps)
        self.n_attempts = n_attempts

    def move(self, batch: Batch) -> None:
        del batch["loss"]
        x, grad, eps = batch["x"], batch.pop("grad"), self.budget.eps
        size = per_image(eps * (1 + torch.cos(math.pi * batch["step"] / self.n_steps)))
        if self.budget.norm == "Linf":
            moved = batch["point"] + size * grad.sign()
            batch["point"] = torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0.0, 1.0)
        else:
            batch["point"] = project_l2(batch["point"] + size * unit_l2(grad), x, eps)
