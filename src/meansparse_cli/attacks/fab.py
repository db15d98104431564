"""FAB-T: the targeted Fast Adaptive Boundary attack (Croce & Hein 2020b), which looks for the nearest adversarial
image.

The iteration of AutoAttack's FAB: project on the linearised boundary, overshoot, step back towards the clean image. Two
things are our own. Only the question "within eps?" is answered, so an example leaves at its first break. And the
forward pass that asks whether a new point is adversarial is sent only while the point is within eps, or was not
adversarial when last asked, and every tenth step: elsewhere FAB's answer is nearly always yes, and a step back.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .budget import distance, finite, per_image
from .judge import CountedModel, misclassified
from .losses import N_TARGETS
from .problem import Norm, Problem
from .queue import Batch, Rule, alphas_of

N_STEPS = 100
OVERSHOOT = 1.05  # the paper's eta
BACKWARD = 0.9  # beta: how much of the way to the clean image's side is kept after a success
BIAS_MAX = 0.1  # alpha_max: the largest weight of the projection of the clean image
ASK_EVERY = 10
NEWTON_STEPS = 20  # at most; three or four are the rule


class FABRule(Rule):
    """FAB aimed in turn at the ``min(9, n_classes - 1)`` likeliest other classes, from the clean image.

    An image farther than eps is not claimed. It has no random part.
    """

    is_targeted, n_attempts = True, N_TARGETS

    def __init__(self, problem: Problem, *, n_steps: int | None = None) -> None:
        self.budget, self.n_steps = problem.budget, N_STEPS if n_steps is None else n_steps

    def begin(self, batch: Batch, generators: Iterator[torch.Generator]) -> None:
        batch["point"] = batch["x"].clone()
        batch["was_adversarial"] = torch.zeros_like(batch["broken"])

    def look(self, model: CountedModel, batch: Batch) -> list[bool]:
        x, norm, gap, normal = batch["x"], self.budget.norm, *self._linearised(model, batch)
        with torch.no_grad():
            moved = self._stepped(batch["point"], x, gap, normal)
            within = distance(moved - x, norm) <= self.budget.eps
            is_tenth = batch["step"] % ASK_EVERY == ASK_EVERY - 1
            ask = within | ~batch["was_adversarial"] | is_tenth
            adversarial = torch.ones_like(within)
            rows = ask.nonzero().squeeze(1)
            if len(rows):
                wrong = misclassified(model(moved[rows], alphas_of(batch, rows)), batch["y"][rows])
                adversarial = adversarial.index_copy(0, rows, wrong)
            batch["broken"] = adversarial & within
            back = adversarial & ~batch["broken"]
            batch["point"] = torch.where(per_image(back), x + (moved - x) * BACKWARD, moved)
            batch["was_adversarial"] = adversarial
            batch["forward"] = batch["forward"] + 1 + ask
            batch["backward"] = batch["backward"] + 1
            return (batch["broken"] | (batch["step"] + 1 == self.n_steps)).tolist()  # type: ignore[no-any-return]

    def found(self, batch: Batch, rows: Tensor) -> Tensor:
        """The clean image where an attempt was survived."""
        return torch.where(per_image(batch["broken"][rows]), batch["point"][rows], batch["x"][rows])

    def _linearised(self, model: CountedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        """At each point, the target's logit minus the true one (n,), and its gradient."""
        point = batch["point"].detach().requires_grad_()
        with torch.enable_grad():
            logits = model(point, batch.get("alphas"))
            own, aimed = (logits.gather(1, batch[key][:, None]) for key in ("y", "target"))
            gap = (aimed - own).squeeze(1)
        return gap.detach(), finite(torch.autograd.grad(gap.sum(), point)[0].detach()).contiguous()

    def _stepped(self, point: Tensor, x: Tensor, gap: Tensor, normal: Tensor) -> Tensor:
        """Beyond the linearised boundary, from the point and from the clean image, weighted by their distances."""
        norm = self.budget.norm
        gap_at_x = gap + (normal * (x - point)).flatten(1).sum(dim=1)
        to_boundary = project_on_boundary(point, normal, gap, norm)
        from_x = project_on_boundary(x, normal, gap_at_x, norm)
        lengths = [distance(delta, norm).clamp(min=1e-8) for delta in (to_boundary, from_x)]
        bias = per_image((lengths[0] / (lengths[0] + lengths[1])).clamp(0, BIAS_MAX))
        moved = (point + OVERSHOOT * to_boundary) * (1 - bias) + (x + OVERSHOOT * from_x) * bias
        return moved.clamp(0, 1)


def project_on_boundary(points: Tensor, normal: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """The smallest move, in ``norm``, that takes each point to where ``gap + <normal, move>`` is zero, within [0, 1].

    ``points`` and ``normal`` (n, channels, height, width), ``gap`` (n,). Where the box does not reach that far, the
    move that comes nearest. Newton's method: what a multiplier gives is concave and piecewise linear in it, so the
    steps rise to the answer and do not pass it.
    """
    # towards larger gap where it is negative, towards smaller where it is positive
    direction = -normal.flatten(1) * torch.where(gap < 0, -1.0, 1.0)[:, None]
    flat, weight, wanted = points.flatten(1), direction.abs(), gap.abs()
    room = torch.where(direction > 0, 1 - flat, flat)
    rate = torch.ones_like(weight) if norm == "Linf" else weight
    multiplier = torch.zeros_like(wanted)
    for _ in range(NEWTON_STEPS):
        length = rate * multiplier[:, None]
        open_ = weight * (length < room)
        reached = (weight * torch.minimum(length, room)).sum(dim=1)
        slope = (open_ * rate).sum(dim=1)
        more = torch.where(slope > 1e-12, (wanted - reached).clamp(min=0) / slope.clamp(min=1e-30), 0.0)
        more = torch.where(more > 1e-6 * multiplier, more, 0.0)  # a row that has arrived stays, whatever the others do
        if not more.any():
            break
        multiplier = multiplier + more
    move = direction.sign() * torch.minimum(rate * multiplier[:, None], room)
    return move.view_as(points)
