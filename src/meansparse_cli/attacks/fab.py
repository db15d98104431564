"""FAB-T: the targeted Fast Adaptive Boundary attack (Croce & Hein 2020b), which looks for the nearest adversarial image.

The iteration of AutoAttack's FAB: project on the linearised boundary, overshoot, step back towards the clean image. Two
things are our own. Only the question "within eps?" is answered, so an example leaves at its first break. And the forward
pass that asks whether a new point is adversarial is sent only where the answer can matter: while the point is within eps,
or was not adversarial when last asked, and every tenth step. Elsewhere FAB's answer is yes (98 to 99 % of the time on
the embedded CIFAR-10 model) and leads nowhere but to a step back.
"""

from collections import deque

import torch
from torch import Tensor

from .batch_queue import Batch, Slot, smooth_progress
from .budget import finite, l2_norm, per_image
from .losses import likely_targets
from .result import Norm
from .task import AttackTask, SearchOutcome

N_STEPS = 100
OVERSHOOT = 1.05  # the paper's eta
BACKWARD = 0.9  # beta: how much of the way to the clean image's side is kept after a success
BIAS_MAX = 0.1  # alpha_max: the largest weight of the projection of the clean image
ASK_EVERY = 10
NEWTON_STEPS = 20  # at most; three or four are the rule


def fab(task: AttackTask, *, n_steps: int | None = None) -> SearchOutcome:
    """FAB aimed in turn at the ``min(9, n_classes - 1)`` likeliest other classes, from the clean image.

    An image farther than eps is not claimed. It has no random part, so its result does not depend on the seed, nor on
    the batch. ``n_steps`` defaults to ``N_STEPS``.
    """
    n, n_steps = len(task.examples.x), N_STEPS if n_steps is None else n_steps
    targets = likely_targets(task.clean_logits)
    n_attempts = targets.shape[1]
    points, claimed = task.examples.x.clone(), torch.zeros(n, dtype=torch.bool, device=task.examples.x.device)
    passes = torch.zeros(n, 2, dtype=torch.int64)
    waiting = deque((example, 0) for example in range(n))
    slots: list[Slot] = []
    batch: Batch = {}
    report = smooth_progress(task.advance, n, n_attempts)

    while waiting or slots:
        if waiting and len(slots) < task.problem.batch_size:
            admitted = [waiting.popleft() for _ in range(min(task.problem.batch_size - len(slots), len(waiting)))]
            fresh = _admit(task, admitted, targets)
            batch = {key: torch.cat([batch[key], fresh[key]]) for key in fresh} if slots else fresh
            slots += admitted
        _step(task, batch)
        leaving = batch["broken"] | (batch["step"] == n_steps)
        left = leaving.tolist()
        if any(left):
            gone = {key: batch[key][leaving] for key in ("point", "broken", "n_asked", "step")}
            gone_slots = [slot for slot, leaves in zip(slots, left, strict=True) if leaves]
            examples = torch.tensor([example for example, _ in gone_slots])
            broken = gone["broken"].to(points.device)
            points[examples[broken.cpu()].to(points.device)] = gone["point"][gone["broken"]].to(points.device)
            claimed[examples.to(points.device)] = broken
            spent = torch.stack([gone["step"] + gone["n_asked"], gone["step"]], dim=1).cpu()
            passes.index_add_(0, examples, spent)
            for (example, attempt), is_broken in zip(gone_slots, broken.tolist(), strict=True):
                over = is_broken or attempt + 1 == n_attempts
                if not over:
                    waiting.append((example, attempt + 1))
                report(n_attempts - attempt if over else 1)
            slots = [slot for slot, leaves in zip(slots, left, strict=True) if not leaves]
            batch = {key: value[~leaving] for key, value in batch.items()}
    return SearchOutcome(points, claimed, passes)


def _admit(task: AttackTask, slots: list[Slot], targets: Tensor) -> Batch:
    device = task.model.device
    examples, attempts = (torch.tensor(part, device=task.examples.x.device) for part in zip(*slots, strict=True))
    x = task.examples.x[examples].to(device).contiguous()
    zeros = torch.zeros(len(slots), dtype=torch.int64, device=device)
    alphas = {} if task.alphas is None else {"alphas": task.alphas[examples.to(task.alphas.device)].to(device)}
    return alphas | {
        "x": x,
        "point": x.clone(),
        "y": task.examples.y[examples].to(device),
        "target": targets[examples.to(targets.device), attempts.to(targets.device)].to(device),
        "step": zeros,
        "n_asked": zeros,
        "was_adversarial": zeros.bool(),
        "broken": zeros.bool(),
    }


def _step(task: AttackTask, batch: Batch) -> None:
    """One iteration of every row; where a row is broken, ``point`` is the adversarial image."""
    x, y, norm = batch["x"], batch["y"], task.problem.budget.norm
    point = batch["point"].detach().requires_grad_()
    with torch.enable_grad():
        logits = task.model(point, batch.get("alphas"))
        gap = (logits.gather(1, batch["target"][:, None]) - logits.gather(1, y[:, None])).squeeze(1)
    normal = finite(torch.autograd.grad(gap.sum(), point)[0].detach()).contiguous()
    with torch.no_grad():
        point, gap = point.detach(), gap.detach()
        gap_at_x = gap + (normal * (x - point)).flatten(1).sum(dim=1)  # of the linearised boundary
        to_boundary = project_on_boundary(point, normal, gap, norm)
        from_x = project_on_boundary(x, normal, gap_at_x, norm)
        lengths = [_size(delta, norm).clamp(min=1e-8) for delta in (to_boundary, from_x)]
        bias = per_image((lengths[0] / (lengths[0] + lengths[1])).clamp(0, BIAS_MAX))
        moved = (point + OVERSHOOT * to_boundary) * (1 - bias) + (x + OVERSHOOT * from_x) * bias
        moved = moved.clamp(0, 1)
        within = _size(moved - x, norm) <= task.problem.budget.eps
        ask = within | ~batch["was_adversarial"] | (batch["step"] % ASK_EVERY == ASK_EVERY - 1)
        adversarial = torch.ones_like(within)
        rows = ask.nonzero().squeeze(1)
        if len(rows):
            alphas = batch["alphas"][rows] if "alphas" in batch else None
            adversarial = adversarial.index_copy(0, rows, task.model(moved[rows], alphas).argmax(dim=1) != y[rows])
        batch["broken"] = adversarial & within
        back = adversarial & ~batch["broken"]
        batch["point"] = torch.where(per_image(back), x + (moved - x) * BACKWARD, moved)
        batch["was_adversarial"] = adversarial
        batch["n_asked"] = batch["n_asked"] + ask
        batch["step"] = batch["step"] + 1


def project_on_boundary(points: Tensor, normal: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """The smallest move, in ``norm``, that takes each point to where ``gap + <normal, move>`` is zero, within [0, 1].

    ``points`` and ``normal`` (n, channels, height, width), ``gap`` (n,). Where the box does not reach that far, the move
    that comes nearest. Newton's method: what a multiplier gives is concave and piecewise linear in it, so the steps rise
    to the answer and do not pass it.
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


def _size(delta: Tensor, norm: Norm) -> Tensor:
    return delta.flatten(1).abs().amax(dim=1) if norm == "Linf" else l2_norm(delta)
