"""Keeps a gradient attack's batch full: an example that is broken leaves at once and the next one takes its place.

Every example carries its own step counter and state, so an example that has just been admitted sits beside older ones,
and its trajectory is the one it would have alone. An example that survives an attempt (a restart, or a target class)
queues again for the next, behind the others: the batch then stays full until the last attempts.
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .budget import finite
from .starts import Start, example_generator
from .task import AttackTask, SearchOutcome

Batch = dict[str, Tensor]
"""Tensors of one length, a row an active example. Always there: ``x``, ``y``, ``example`` (its position), ``target``, ``point`` (the image to be
evaluated next), ``step`` (steps taken), ``best_loss``, ``best_point``, ``passes`` (rows, 2) spent in this attempt; of
the last evaluation, ``improved`` and ``broken``."""


Slot = tuple[int, int]
"""(example, attempt): what occupies a row of the batch, or waits to."""


class StepRule(Protocol):
    """What makes one gradient attack differ from another.

    A rule whose loss needs more than the logits has, beside ``loss``, ``evaluate(model, batch, point) -> (logits, loss)``.
    """

    n_steps: int
    start: Start

    def loss(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        """(n, n_classes) -> (n,), to be increased."""
        ...

    def begin(self, batch: Batch) -> None:
        """Add the rule's own state to freshly admitted rows."""
        ...

    def advance(self, batch: Batch, loss: Tensor, grad: Tensor) -> None:
        """Move every ``point`` one step, given the loss and gradient there."""
        ...


def climb(task: AttackTask, rule: StepRule, *, targets: Tensor) -> SearchOutcome:
    """Run ``rule`` on every example of ``task`` until it is broken or has survived ``n_attempts`` runs.

    ``targets`` (n, n_attempts) int64: the class aimed at in each attempt, ignored by untargeted losses.
    """
    n_attempts = targets.shape[1]
    n = task.examples.x.shape[0]
    points = task.examples.x.clone()
    claimed = torch.zeros(n, dtype=torch.bool, device=points.device)
    passes = torch.zeros(n, 2, dtype=torch.int64)
    evaluate = getattr(rule, "evaluate", None)
    waiting = deque((example, 0) for example in range(n))
    slots: list[Slot] = []
    batch: Batch = {}
    report = smooth_progress(task.advance, n, n_attempts)

    while waiting or slots:
        n_free = task.problem.batch_size - len(slots)
        if waiting and n_free > 0:
            admitted = [waiting.popleft() for _ in range(min(n_free, len(waiting)))]
            fresh = _admit(task, rule, admitted, targets)
            batch = {key: torch.cat([batch[key], fresh[key]]) for key in fresh} if slots else fresh
            slots += admitted

        point = batch["point"].detach().requires_grad_()
        n_before = task.model.forward_passes, task.model.backward_passes
        with torch.enable_grad():
            if evaluate is not None:
                logits, loss = evaluate(task.model, batch, point)
            else:
                logits = task.model(point, batch.get("alphas"))
                loss = rule.loss(logits, batch["y"], batch["target"])
        _note_best(batch, point.detach(), loss.detach())
        batch["broken"] = logits.detach().argmax(dim=1) != batch["y"]
        leaving = batch["broken"] | (batch["step"] == rule.n_steps)
        left = leaving.tolist()  # waits for the device, once a step
        # A last point needs no gradient; where other rows go on, it comes with theirs.
        grad = point if all(left) else finite(torch.autograd.grad(loss.sum(), point)[0].detach())
        loss = loss.detach()
        n_after = task.model.forward_passes, task.model.backward_passes
        spent = [(after - before) // len(slots) for before, after in zip(n_before, n_after, strict=True)]
        needed = torch.tensor([[spent[0], 0 if leaves else spent[1]] for leaves in left])
        batch["passes"] = batch["passes"] + needed  # what the example would take alone

        if any(left):
            # by index: a boolean mask would have the device waited for once more, for every tensor of the batch
            gone_rows = torch.tensor([row for row, leaves in enumerate(left) if leaves])
            kept_rows = torch.tensor([row for row, leaves in enumerate(left) if not leaves], dtype=torch.int64)
            gone_there, kept_there = gone_rows.to(leaving.device), kept_rows.to(leaving.device)
            gone = {key: batch[key][gone_there] for key in ("point", "best_point", "broken")}
            gone_slots = [slot for slot, leaves in zip(slots, left, strict=True) if leaves]
            # The misclassified point, or the best one of an attempt survived.
            found = torch.where(gone["broken"].view(-1, 1, 1, 1), gone["point"], gone["best_point"])
            examples = torch.tensor([example for example, _ in gone_slots], device=points.device)
            points[examples] = found.to(points.device)
            claimed[examples] = gone["broken"].to(points.device)
            passes.index_add_(0, examples.cpu(), batch["passes"][gone_rows])
            for (example, attempt), is_broken in zip(gone_slots, gone["broken"].tolist(), strict=True):
                over = is_broken or attempt + 1 == n_attempts
                if not over:
                    waiting.append((example, attempt + 1))
                report(n_attempts - attempt if over else 1)
            slots = [slot for slot, leaves in zip(slots, left, strict=True) if not leaves]
            batch = {key: value[kept_rows if key == "passes" else kept_there] for key, value in batch.items()}
            loss, grad = loss[kept_there], grad[kept_there]

        if slots:
            rule.advance(batch, loss, grad)
            batch["step"] = batch["step"] + 1
    return SearchOutcome(points, claimed, passes)


def _admit(task: AttackTask, rule: StepRule, slots: list[Slot], targets: Tensor) -> Batch:
    """The rows of newly admitted (example, attempt) pairs, at their starts, on the model's device."""
    device = task.model.device
    examples = torch.tensor([example for example, _ in slots])
    attempts = torch.tensor([attempt for _, attempt in slots])
    there = examples.to(task.examples.x.device)
    x = task.examples.x[there].to(device).contiguous()
    points = []
    for image, (example, attempt) in zip(x.cpu(), slots, strict=True):  # drawn on the CPU, and copied once
        generator = example_generator(task.problem.seed, task.attack, attempt, int(task.examples.indices[example]))
        points.append(rule.start(image, generator, task.problem.budget))
    batch: Batch = {
        "x": x,
        "y": task.examples.y[there].to(device),
        "example": examples.to(device),
        "target": targets[examples.to(targets.device), attempts.to(targets.device)].to(device),
        "point": torch.stack(points).to(device),
        "step": torch.zeros(len(slots), dtype=torch.int64, device=device),
        "best_loss": torch.full((len(slots),), -torch.inf, device=device),
        "best_point": x.clone(),
        "improved": torch.ones(len(slots), dtype=torch.bool, device=device),
        "broken": torch.zeros(len(slots), dtype=torch.bool, device=device),
        "passes": torch.zeros(len(slots), 2, dtype=torch.int64),  # on the CPU
    }
    if task.alphas is not None:
        batch["alphas"] = task.alphas[examples.to(task.alphas.device)].to(device)
    rule.begin(batch)
    return batch


def _note_best(batch: Batch, point: Tensor, loss: Tensor) -> None:
    improved = loss > batch["best_loss"]
    batch["improved"] = improved
    batch["best_loss"] = torch.where(improved, loss, batch["best_loss"])
    batch["best_point"] = torch.where(improved.view(-1, 1, 1, 1), point, batch["best_point"])


def smooth_progress(advance: Callable[[int], None], n: int, n_attempts: int) -> Callable[[int], None]:
    """Attempts done -> examples done: many attempts end long before the first example does."""
    attempts_done = examples_told = 0

    def report(attempts: int) -> None:
        nonlocal attempts_done, examples_told
        attempts_done += attempts
        examples = attempts_done // n_attempts
        if examples > examples_told:
            advance(examples - examples_told)
            examples_told = examples

    return report
