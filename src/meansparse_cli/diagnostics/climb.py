"""One more APGD on examples of a subject, as the checks of the search need it."""

import torch
from torch import Tensor

from ..attacks.apgd import APGDRule
from ..attacks.batch_queue import Batch, climb
from ..attacks.budget import enforce_budget
from ..attacks.judge import full_float32
from ..attacks.losses import LossName
from ..attacks.result import Budget
from ..attacks.task import AttackTask
from ..operator.sparsify import backward_rule
from .subject import Subject


class Recorded:
    """An APGD rule that writes down the best loss of each example at each step: ``history`` (n, n_steps)."""

    def __init__(self, rule: APGDRule, history: Tensor) -> None:
        self.rule, self.history = rule, history
        self.n_steps, self.start, self.loss, self.begin = rule.n_steps, rule.start, rule.loss, rule.begin

    def advance(self, batch: Batch, loss: Tensor, grad: Tensor) -> None:
        self.history[batch["example"], batch["step"]] = batch["best_loss"]
        self.rule.advance(batch, loss, grad)


def climb_again(
    subject: Subject, rows: Tensor, budget: Budget, *, loss: LossName, n_steps: int, history: Tensor | None = None
) -> Tensor:
    """APGD through the backward rule of the subject on the examples at ``rows`` (m,), judged: broken (m,) on the CPU.

    What it breaks inside the subject's own budget is kept. ``history`` (m, n_steps): filled with the best loss at each
    step.
    """
    counted, conditions, own = subject.counted(), subject.conditions, subject.examples.at(rows)
    x = own.x.contiguous()
    rule = APGDRule(budget, loss, n_classes=conditions.n_classes, n_steps=n_steps)
    task = AttackTask(
        attack=f"doubt-{loss}-{n_steps}",
        model=counted,
        x=x,
        y=own.y,
        indices=own.indices,
        clean_logits=subject.logits(x),
        budget=budget,
        seed=conditions.seed,
        batch_size=conditions.batch_size,
        advance=lambda n: None,
        per_row={} if history is None else {"example": torch.arange(len(rows))},
    )
    with backward_rule(subject.model, subject.rule), full_float32(counted.device):
        found = climb(task, rule if history is None else Recorded(rule, history), targets=own.y[:, None])
    points = enforce_budget(found.points.to(x.device), x, budget)
    broken = found.claimed.to(x.device) & (subject.logits(points).argmax(1) != own.y)
    if budget == conditions.budget:
        subject.keep(rows[broken], points[broken])
    return broken.cpu()
