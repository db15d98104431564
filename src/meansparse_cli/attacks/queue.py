"""Keeps a search's batch full: an example that is broken leaves at once and the next one takes its place.

Every example carries its own step counter and state, so its trajectory is the one it would have alone. One that
survives an attempt (a target class) queues again for the next, behind the others.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..data.examples import Examples
from .budget import example_generator
from .judge import CountedModel
from .problem import Problem
from .targets import likely_targets, nearest_first

Batch = dict[str, Tensor]
"""Tensors of one length on the model's device, a row an active example. Always there: ``example`` (its position),
``x``, ``y``, ``target``, ``alphas`` where each row has its own, ``step`` (steps taken), ``broken`` at its last point,
and the passes spent in this attempt, ``forward`` and ``backward``."""

Slot = tuple[int, int]
"""(example, attempt): what occupies a row of the batch, or waits to."""


@dataclass(frozen=True)
class AttackTask:
    """n examples to attack, every one of them classified correctly at the clean image.

    ``attack``: what the random starts are drawn for. ``model``: the form of ``problem.model`` that is searched.
    ``clean_logits`` (n, n_classes). ``alphas`` (n, n_sites): each example's variant; None: the model as it stands.
    ``advance`` is called with the number of examples finished since its last call.
    """

    attack: str
    model: CountedModel
    problem: Problem
    examples: Examples
    clean_logits: Tensor
    alphas: Tensor | None = None
    advance: Callable[[int], None] = lambda n_examples: None

    def at(self, rows: Tensor) -> "AttackTask":
        """The same of some examples: ``rows`` int64 or bool, on their device."""
        alphas = None if self.alphas is None else self.alphas[rows.to(self.alphas.device)]
        return replace(self, examples=self.examples.at(rows), clean_logits=self.clean_logits[rows], alphas=alphas)


@dataclass(frozen=True)
class SearchOutcome:
    """The claims of a search, before the judge has seen them.

    ``points`` (n, channels, height, width): the misclassified image where ``claimed`` (n,) is true, elsewhere any.
    ``passes`` (n, 2) int64 on the CPU: forward and backward passes spent on each example.
    """

    points: Tensor
    claimed: Tensor
    passes: Tensor


class Rule(Protocol):
    """One attack, as the queue runs it; it keeps nothing of an example but in the batch."""

    is_targeted: bool = False
    """Whether each attempt aims at another of the likeliest classes at the clean image."""
    n_attempts: int = 1
    """How often an example that is not broken comes round again, each time from another start; at most as often as
    there are other classes where the rule is targeted."""
    n_candidates: int = 0
    """Of so many of the likeliest classes it aims at those nearest to the image; 0: at the likeliest themselves."""

    def begin(self, batch: Batch, generators: Iterator[torch.Generator]) -> None:
        """Add the rule's own state to freshly admitted rows; each row draws what it needs from its own generator."""
        ...

    def look(self, model: CountedModel, batch: Batch) -> list[bool]:
        """Show the model every row's point; says which rows leave, broken or at the end of their attempt."""
        ...

    def move(self, batch: Batch) -> None:
        """Move the rows that stay to their next point, where ``look`` has not done so."""

    def found(self, batch: Batch, rows: Tensor) -> Tensor:
        """The images (m, channels, height, width) with which ``rows`` (m,) leave: misclassified ones where broken."""
        ...


def search(task: AttackTask, rule: Rule) -> SearchOutcome:
    """Run ``rule`` on every example of ``task`` until it is broken or has survived ``n_attempts`` runs."""
    queue = _Queue(task, rule)
    while queue.admit():
        left = rule.look(task.model, queue.batch)
        if any(left):
            queue.dismiss(left)
        if queue.slots:
            rule.move(queue.batch)
            queue.batch["step"] = queue.batch["step"] + 1
    return SearchOutcome(queue.points, queue.claimed, queue.passes)


class _Queue:
    """The examples that wait, those in the batch, and the outcomes of the others."""

    def __init__(self, task: AttackTask, rule: Rule) -> None:
        self.task, self.rule, x = task, rule, task.examples.x
        self.points, self.claimed = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.passes = torch.zeros(len(x), 2, dtype=torch.int64)
        self.targets = self._targets()
        n, self.n_attempts = self.targets.shape
        self.waiting = deque((example, 0) for example in range(n))
        self.slots: list[Slot] = []
        self.batch: Batch = {}
        self.n_attempts_done = self.n_told = 0

    def _targets(self) -> Tensor:
        """(n, n_attempts): the class that each attempt at an example aims at; its own where the rule has no target."""
        task, rule = self.task, self.rule
        if not rule.is_targeted:
            return task.examples.y[:, None].expand(-1, rule.n_attempts)
        targets = likely_targets(task.clean_logits, rule.n_candidates or rule.n_attempts)
        if rule.n_candidates:
            parts = torch.arange(len(targets), device=targets.device).split(task.problem.batch_that_fits)
            targets = torch.cat([self._nearest_first(rows, targets[rows]) for rows in parts])
        return targets[:, : rule.n_attempts]

    def _nearest_first(self, rows: Tensor, targets: Tensor) -> Tensor:
        part, model, norm = self.task.at(rows), self.task.model, self.task.problem.budget.norm
        n_forward, n_backward = model.forward_passes, model.backward_passes
        x, y, aimed = (tensor.to(model.device) for tensor in (part.examples.x, part.examples.y, targets))
        alphas = None if part.alphas is None else part.alphas.to(model.device)
        ordered = nearest_first(model, x.contiguous(), y, aimed, norm, alphas)
        spent = torch.tensor([model.forward_passes - n_forward, model.backward_passes - n_backward])
        self.passes[rows.cpu()] += spent // len(rows)
        return ordered.to(targets.device)

    def admit(self) -> bool:
        """Fill the batch up; false where nobody is in it, nor waits."""
        n_free = min(self.task.problem.batch_that_fits - len(self.slots), len(self.waiting))
        if n_free > 0:
            admitted = [self.waiting.popleft() for _ in range(n_free)]
            fresh = self._rows(admitted)
            self.batch = {key: torch.cat([self.batch[key], fresh[key]]) for key in fresh} if self.slots else fresh
            self.slots += admitted
        return bool(self.slots)

    def dismiss(self, left: list[bool]) -> None:
        """Take note of the rows that leave, and take them out of the batch."""
        batch = self.batch
        # by index: a boolean mask would have the device waited for once more, for every tensor of the batch
        gone = self._index(left, True)
        slots = [slot for slot, leaves in zip(self.slots, left, strict=True) if leaves]
        examples = torch.tensor([example for example, _ in slots])
        there = examples.to(self.points.device)
        self.points[there] = self.rule.found(batch, gone).to(self.points.device)
        self.claimed[there] = batch["broken"][gone].to(self.points.device)
        told = torch.stack([batch[key][gone].long() for key in ("broken", "forward", "backward")], dim=1).cpu()
        self.passes.index_add_(0, examples, told[:, 1:])
        for (example, attempt), is_broken in zip(slots, told[:, 0].tolist(), strict=True):
            over = is_broken or attempt + 1 == self.n_attempts
            if not over:
                self.waiting.append((example, attempt + 1))
            self.n_attempts_done += self.n_attempts - attempt if over else 1
        # many attempts end long before the first example does: so many examples' worth of them
        if (done := self.n_attempts_done // self.n_attempts) > self.n_told:
            self.task.advance(done - self.n_told)
            self.n_told = done
        self.slots = [slot for slot, leaves in zip(self.slots, left, strict=True) if not leaves]
        if self.slots:
            kept = self._index(left, False)
            self.batch = {key: value[kept] for key, value in batch.items()}

    def _index(self, left: list[bool], value: bool) -> Tensor:
        rows = [row for row, leaves in enumerate(left) if leaves == value]
        return torch.tensor(rows, dtype=torch.int64).to(self.task.model.device)

    def _rows(self, slots: list[Slot]) -> Batch:
        """The rows of newly admitted slots, as the rule begins them, on the model's device."""
        task, given, device = self.task, self.task.examples, self.task.model.device
        examples = torch.tensor([example for example, _ in slots])
        attempts = torch.tensor([attempt for _, attempt in slots])
        there, aimed = examples.to(given.x.device), self.targets.device
        zeros = torch.zeros(len(slots), dtype=torch.int64, device=device)
        batch: Batch = {
            "example": examples.to(device),
            "x": given.x[there].to(device).contiguous(),
            "y": given.y[there].to(device),
            "target": self.targets[examples.to(aimed), attempts.to(aimed)].to(device),
            "step": zeros,
            "broken": zeros.bool(),
            "forward": zeros,
            "backward": zeros,
        }
        if task.alphas is not None:
            batch["alphas"] = task.alphas[examples.to(task.alphas.device)].to(device)
        generators = (
            example_generator(task.problem.seed, task.attack, attempt, int(given.indices[example]))
            for example, attempt in slots
        )
        self.rule.begin(batch, generators)
        return batch


def alphas_of(batch: Batch, rows: Tensor) -> Tensor | None:
    """The alphas (m, n_sites) of some rows (m,); None where the model is taken as it stands."""
    return batch["alphas"][rows] if "alphas" in batch else None
