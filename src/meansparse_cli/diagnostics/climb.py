"""One more APGD on examples of a subject, as the checks of the search need it."""

from dataclasses import replace

from torch import Tensor

from ..attacks.apgd import APGDRule
from ..attacks.budget import enforce_budget
from ..attacks.judge import judge
from ..attacks.losses import LossName
from ..attacks.problem import Budget
from ..attacks.queue import AttackTask, Batch, search
from ..operator.active import backward_rule
from ..operator.device import full_float32
from .subject import Subject


class Recorded(APGDRule):
    """APGD that writes down the best loss of each example at each step, where ``history`` (n, n_steps) is given."""

    history: Tensor | None = None

    def move(self, batch: Batch) -> None:
        if self.history is not None:
            self.history[batch["example"], batch["step"]] = batch["best_loss"]
        super().move(batch)


def climb_again(
    subject: Subject, rows: Tensor, budget: Budget, *, loss: LossName, n_steps: int, history: Tensor | None = None
) -> Tensor:
    """APGD through the backward rule of the subject on the examples at ``rows`` (m,), judged: broken (m,) on the CPU.

    What it breaks inside the subject's own budget is kept. ``history`` (m, n_steps): filled with the best loss at each
    step.
    """
    problem, given = replace(subject.problem, budget=budget), subject.examples.at(rows)
    own = replace(given, x=given.x.contiguous())
    rule = Recorded(problem, loss=loss, n_steps=n_steps)
    rule.history = history
    counted = subject.counted()
    task = AttackTask(f"doubt-{loss}-{n_steps}", counted, problem, own, subject.logits(own.x))
    with backward_rule(subject.model, subject.rule), full_float32(counted.device):
        found = search(task, rule)
    points = enforce_budget(found.points.to(own.x.device), own.x, budget)
    broken = found.claimed.to(own.x.device) & judge(problem, points, own.y)
    if budget == subject.problem.budget:
        subject.keep(rows[broken], points[broken])
    return broken.cpu()
