"""APGD: projected gradient ascent with momentum and a step size that halves itself (Croce & Hein 2020, algorithm 1)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .ascent import Ascent
from .budget import boundary_start, per_image, steepest
from .losses import N_TARGETS, LossName, choose_loss
from .problem import Problem
from .queue import Batch

N_STEPS = 100
MOMENTUM = 0.75  # the paper's alpha: the weight of the gradient step against the last move
RHO = 0.75  # below this fraction of increasing steps, the step size halves


class APGDRule(Ascent):
    """APGD on ``loss``: per example the trajectory of AutoAttack's from the same start, up to the break.

    ``n_attempts`` defaults to the ``N_TARGETS`` likeliest classes of a targeted loss, else to one start.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        loss: LossName = "ce",
        n_steps: int | None = None,
        n_attempts: int | None = None,
        n_candidates: int = 0,
    ) -> None:
        n_steps = n_steps or N_STEPS
        super().__init__(problem.budget, choose_loss(loss, problem.n_classes), boundary_start, n_steps)
        self.is_targeted, self.n_candidates = loss.endswith("-targeted"), n_candidates
        self.n_attempts = n_attempts or (N_TARGETS if self.is_targeted else 1)
        # Checkpoints (section 3): the first after 22 % of the steps, each next one 3 % sooner, at least 6 % apart.
        self.first_interval = max(int(0.22 * n_steps), 1)
        self.interval_decrease = max(int(0.03 * n_steps), 1)
        self.least_interval = max(int(0.06 * n_steps), 1)

    def begin(self, batch: Batch, generators: Iterator[torch.Generator]) -> None:
        super().begin(batch, generators)
        x, step = batch["x"], batch["step"]
        zeros = torch.zeros(len(step), device=x.device)
        batch["previous_point"] = batch["point"]
        batch["best_grad"] = torch.zeros_like(x)
        batch["step_size"] = zeros + 2.0 * self.budget.eps
        batch["previous_loss"] = zeros
        batch["n_increases"] = torch.zeros_like(step)
        batch["interval"] = torch.full_like(step, self.first_interval)
        batch["next_check"] = torch.full_like(step, self.first_interval)
        batch["best_loss_at_check"] = zeros
        batch["halved_at_check"] = torch.ones_like(step, dtype=torch.bool)

    def move(self, batch: Batch) -> None:
        loss, grad = batch.pop("loss"), batch.pop("grad")
        batch["best_grad"] = torch.where(per_image(batch["improved"]), grad, batch["best_grad"])
        restart = self._check_step_size(batch, loss)
        point = torch.where(per_image(restart), batch["best_point"], batch["point"])
        grad = torch.where(per_image(restart), batch["best_grad"], grad)
        # The momentum is measured from the last point visited, also after a return to the best one.
        last_move = point - batch["previous_point"]
        weight = per_image(torch.where(batch["step"] == 0, 1.0, MOMENTUM))
        step = per_image(batch["step_size"]) * steepest(grad, self.budget.norm)
        moved = self.projected(batch, point + step)
        moved = point + (moved - point) * weight + last_move * (1 - weight)
        batch["previous_point"] = point
        batch["point"] = self.projected(batch, moved)

    def _check_step_size(self, batch: Batch, loss: Tensor) -> Tensor:
        """Halve the step size of rows at a checkpoint that do not progress; returns those rows, (n,) bool.

        Condition 1: too few of the steps since the last checkpoint increased the loss. Condition 2: the step size was
        not halved at the last checkpoint and the best loss has not risen since.
        """
        step, first = batch["step"], batch["step"] == 0
        # AutoAttack compares the loss after the first step with zero, not with the loss at the start. So do we: the
        # cross-entropy always counts as risen there, the DLR of an unbroken example never.
        batch["n_increases"] = batch["n_increases"] + ((loss > batch["previous_loss"]) & ~first)
        batch["previous_loss"] = torch.where(first, 0.0, loss)
        batch["best_loss_at_check"] = torch.where(first, loss, batch["best_loss_at_check"])

        at_check = step == batch["next_check"]
        few_increases = batch["n_increases"] <= RHO * batch["interval"]
        stalled = ~batch["halved_at_check"] & (batch["best_loss_at_check"] >= batch["best_loss"])
        halve = at_check & (few_increases | stalled)
        batch["step_size"] = torch.where(halve, batch["step_size"] / 2, batch["step_size"])

        batch["halved_at_check"] = torch.where(at_check, halve, batch["halved_at_check"])
        batch["best_loss_at_check"] = torch.where(at_check, batch["best_loss"], batch["best_loss_at_check"])
        batch["n_increases"] = torch.where(at_check, 0, batch["n_increases"])
        shorter = (batch["interval"] - self.interval_decrease).clamp(min=self.least_interval)
        batch["interval"] = torch.where(at_check, shorter, batch["interval"])
        batch["next_check"] = torch.where(at_check, step + batch["interval"], batch["next_check"])
        return halve
