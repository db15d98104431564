"""PGD with a fixed step (Madry et al. 2018): the attack of the MeanSparse paper's tables 5 and 12."""

import torch
from torch import Tensor

from .batch_queue import Batch, climb
from .budget import project_l2, unit_l2
from .losses import cross_entropy
from .result import Budget
from .starts import Start, uniform_start
from .task import AttackTask, SearchOutcome

N_STEPS = 50
PAPER_STEP_SIZE = 0.0078  # Linf, in pixel units: the reference code's value for 50 steps
STEP_SIZE = 2 / 255  # for any other number of steps


def pgd(task: AttackTask, *, n_steps: int | None = None, step_size: float | None = None) -> SearchOutcome:
    """PGD on cross-entropy from one start, uniform in the ball.

    ``n_steps`` defaults to ``N_STEPS``; ``step_size``, in pixel units, to the constants above for Linf and to
    2.5 eps / n_steps for L2. An example leaves at its first misclassified point.
    """
    rule = PGDRule(task.problem.budget, n_steps=n_steps or N_STEPS, step_size=step_size)
    return climb(task, rule, targets=task.examples.y[:, None])


class PGDRule:
    """x <- projection(x + step_size * sign(gradient)), or the unit gradient for L2."""

    def __init__(self, budget: Budget, *, n_steps: int, step_size: float | None) -> None:
        self.budget = budget
        self.start: Start = uniform_start
        self.n_steps = n_steps
        linf_size = PAPER_STEP_SIZE if n_steps == N_STEPS else STEP_SIZE
        default = linf_size if budget.norm == "Linf" else 2.5 * budget.eps / n_steps
        self.step_size = default if step_size is None else step_size

    def loss(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(logits, y, target)

    def begin(self, batch: Batch) -> None:
        """PGD remembers nothing but where it is."""

    def advance(self, batch: Batch, loss: Tensor, grad: Tensor) -> None:
        x, eps = batch["x"], self.budget.eps
        if self.budget.norm == "Linf":
            moved = batch["point"] + self.step_size * grad.sign()
            batch["point"] = torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0.0, 1.0)
        else:
            batch["point"] = project_l2(batch["point"] + self.step_size * unit_l2(grad), x, eps)
