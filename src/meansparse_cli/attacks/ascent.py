"""The gradient attack that the others are variants of: random start, a loss that is climbed, the best point seen."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..operator.active import progress_set
from .budget import Start, finite, linf_bounds, per_image, project, steepest
from .judge import CountedModel, misclassified
from .losses import Loss
from .problem import Budget
from .queue import Batch, Rule


class Ascent(Rule):
    """A rule of the queue that follows the gradient of ``loss`` for ``n_steps`` steps; ``move`` is the attack's own.

    Beside what the queue keeps, a row has ``point`` (the image to be shown next), ``best_point``, ``best_loss`` and
    ``improved`` (at the last point); between ``look`` and ``move`` also ``loss`` and ``grad`` there.
    """

    def __init__(self, budget: Budget, loss: Loss, start: Start, n_steps: int) -> None:
        self.budget, self.loss, self.start, self.n_steps = budget, loss, start, n_steps

    def begin(self, batch: Batch, generators: Iterator[torch.Generator]) -> None:
        x = batch["x"]
        # drawn on the CPU, and copied once
        starts = [self.start(image, own, self.budget) for image, own in zip(x.cpu(), generators, strict=True)]
        batch["point"] = torch.stack(starts).to(x.device)
        batch["best_point"] = x.clone()
        batch["best_loss"] = torch.full((len(x),), -torch.inf, device=x.device)
        batch["improved"] = torch.ones(len(x), dtype=torch.bool, device=x.device)
        if self.budget.norm == "Linf":  # once a row, not at each of its steps
            batch["lower"], batch["upper"] = linf_bounds(x, self.budget.eps)

    def look(self, model: CountedModel, batch: Batch) -> list[bool]:
        point = batch["point"].detach().requires_grad_()
        n, n_forward, n_backward = len(point), model.forward_passes, model.backward_passes
        with torch.enable_grad(), progress_set(model.model, batch["step"] / self.n_steps):
            logits = model(point, batch.get("alphas"))
            loss = self.loss(logits, batch["y"], batch["target"])
        improved = loss.detach() > batch["best_loss"]
        batch["improved"] = improved
        batch["best_loss"] = torch.where(improved, loss.detach(), batch["best_loss"])
        batch["best_point"] = torch.where(per_image(improved), point.detach(), batch["best_point"])
        batch["broken"] = misclassified(logits.detach(), batch["y"])
        leaving = batch["broken"] | (batch["step"] == self.n_steps)
        left = leaving.tolist()  # waits for the device, once a step
        # A last point needs no gradient; where other rows go on, it comes with theirs.
        if not all(left):
            batch["grad"] = finite(torch.autograd.grad(loss.sum(), point)[0].detach())
            batch["loss"] = loss.detach()
        # what the example would take alone
        batch["forward"] = batch["forward"] + (model.forward_passes - n_forward) // n
        batch["backward"] = batch["backward"] + (model.backward_passes - n_backward) // n * ~leaving
        return left

    def step_along(self, batch: Batch, size: float | Tensor) -> None:
        """Along the gradient by ``size``, in pixel units, or one (n, 1, 1, 1) a row, and back into the budget."""
        del batch["loss"]
        step = size * steepest(batch.pop("grad"), self.budget.norm)
        batch["point"] = self.projected(batch, batch["point"] + step)

    def projected(self, batch: Batch, points: Tensor) -> Tensor:
        """``budget.project``, by the bounds that a row keeps."""
        if self.budget.norm == "Linf":
            return points.clamp(batch["lower"], batch["upper"])
        return project(points, batch["x"], self.budget)

    def found(self, batch: Batch, rows: Tensor) -> Tensor:
        """The misclassified point, or the best one of an attempt survived."""
        return torch.where(per_image(batch["broken"][rows]), batch["point"][rows], batch["best_point"][rows])
