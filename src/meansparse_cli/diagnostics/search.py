"""Doubts about the search: had it converged, and do other budgets give what they must?"""

from dataclasses import replace

import torch
from torch import Tensor

from ..attacks.apgd import N_STEPS, APGDRule
from ..attacks.batch_queue import Batch, climb
from ..attacks.budget import enforce_budget
from ..attacks.losses import LossName
from ..attacks.problem import Problem
from ..attacks.result import Budget
from ..attacks.starts import example_generator, uniform_start
from ..attacks.task import AttackTask
from ..data.examples import Examples
from ..errors import AttackError
from ..operator.float32 import full_float32
from ..operator.sparsify import backward_rule
from .doubt import CARLINI, PINTOR, Check, Doubt, Subject

RISING = Check("loss still rising at the last step", 0.1, "share", f"{PINTOR}; the limit is ours")
MORE = Check("more steps and another start", 0, "share", f"{CARLINI}; {PINTOR}")
NOISE = Check("accuracy lost to random noise", 0.05, "points", f"{CARLINI}; the limit is ours")
NOISE_BREAKS = Check("noise breaks what attacks left", 0, "count", CARLINI)
LARGE_EPS = Check("robust accuracy at a large eps", 0.02, "share", f"{CARLINI}; {PINTOR}")

LAST_PART = 0.1
"""The last steps of a climb, and the part of its rise that may fall into them."""
N_DRAWS = 100
N_STEPS_LARGE = 40
TIMES_EPS = (2, 4, 8)
LARGEST_CHANGE = 0.5
"""With half the pixel range for every pixel, every image can be made the same grey."""


class Recorded:
    """An APGD rule that writes down the best loss of each example at each step: ``history`` (n, n_steps)."""

    def __init__(self, rule: APGDRule, history: Tensor) -> None:
        self.rule, self.history = rule, history
        self.n_steps, self.start = rule.n_steps, rule.start

    def loss(self, logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
        return self.rule.loss(logits, y, target)

    def begin(self, batch: Batch) -> None:
        self.rule.begin(batch)

    def advance(self, batch: Batch, loss: Tensor, grad: Tensor) -> None:
        self.history[batch["example"], batch["step"]] = batch["best_loss"]
        self.rule.advance(batch, loss, grad)


def doubt_search(subject: Subject) -> list[Doubt]:
    """Every doubt of this kind; none where the model has no gradient at all."""
    try:
        searched = [*_converged(subject), _large_eps(subject)]
    except AttackError as error:
        searched = [check.not_run(subject, error.message) for check in (RISING, MORE, LARGE_EPS)]
    return [*searched, *_noise(subject)]


def _converged(subject: Subject) -> list[Doubt]:
    """The examples that survived everything, from another start: as many steps as before, watched, then twice as many."""
    rows = subject.robust.nonzero().flatten()
    if not len(rows):
        return [check.not_run(subject, "no example survived the attacks") for check in (RISING, MORE)]
    again = replace(subject, seed=subject.seed + 1)
    history = torch.full((len(rows), N_STEPS), torch.nan, device=subject.x.device)
    broken = _climb(again, rows, subject.budget, loss="ce", n_steps=N_STEPS, history=history)
    survived = history.cpu()[~broken]
    total = survived[:, -1] - survived[:, 0]
    late = survived[:, -1] - survived[:, round((1 - LAST_PART) * N_STEPS) - 1]
    rising = (late > LAST_PART * total) & (total > 0)
    share = float(rising.float().mean()) if len(survived) else 0.0
    n_more = broken.clone()
    for loss in ("ce", "dlr"):
        left = (~n_more).nonzero().flatten()
        if len(left):
            n_more[left] = _climb(again, rows[left.to(rows.device)], subject.budget, loss=loss, n_steps=2 * N_STEPS)  # type: ignore[arg-type]
    n, n_new = len(subject.y), int(n_more.sum())
    return [
        RISING.judged(
            subject, share,
            f"{int(rising.sum())} of {len(survived)} surviving examples gain more than {LAST_PART:.0%} of their rise in "
            f"the last {LAST_PART:.0%} of {N_STEPS} steps",
        ),
        MORE.judged(
            subject, n_new / n,
            f"APGD from another start, {N_STEPS} and {2 * N_STEPS} steps, broke {n_new} more of {n} examples "
            f"({len(rows)} had survived)",
            n_new=n_new, n_survivors=len(rows), n_new_same_steps=int(broken.sum()),
        ),
    ]  # fmt: skip


def _large_eps(subject: Subject) -> Doubt:
    """A budget in which every image can be made any other leaves nothing, unless the attack is blind."""
    rows = subject.correct.nonzero().flatten()
    accuracies, n = {}, len(subject.y)
    for eps in _large_budgets(subject.budget, subject.x[0].numel()):
        if len(rows):
            budget = Budget(subject.budget.norm, eps)
            rows = rows[~_climb(subject, rows, budget, loss="ce", n_steps=N_STEPS_LARGE).to(rows.device)]
        accuracies[f"{eps:.4g}"] = len(rows) / n
    largest, value = list(accuracies.items())[-1]
    return LARGE_EPS.judged(
        subject, value,
        f"{len(rows)} of {n} examples are still right at eps {largest}, where every image can be made unrecognisable "
        f"({N_STEPS_LARGE} steps of APGD); at smaller ones: "
        + ", ".join(f"{100 * a:.0f} % at {e}" for e, a in list(accuracies.items())[:-1]),
        robust_accuracy=accuracies,
    )  # fmt: skip


def _large_budgets(budget: Budget, n_pixels: int) -> list[float]:
    most = LARGEST_CHANGE * (1 if budget.norm == "Linf" else n_pixels**0.5)
    return sorted({min(times * budget.eps, most) for times in TIMES_EPS} | {max(most, budget.eps)})


def _noise(subject: Subject) -> list[Doubt]:
    """Uniform noise in the ball, ``N_DRAWS`` draws an example."""
    n_right, ever_wrong = 0, torch.zeros(len(subject.y), dtype=torch.bool, device=subject.y.device)
    for draw in range(N_DRAWS):
        images = torch.stack(
            [
                uniform_start(image, example_generator(subject.seed, "noise", draw, int(index)), subject.budget)
                for image, index in zip(subject.x.cpu(), subject.indices, strict=True)
            ]
        ).to(subject.x.device)
        images = enforce_budget(images, subject.x, subject.budget)
        right = subject.logits(images).argmax(1) == subject.y
        n_right += int(right.sum())
        new = ~right & ~ever_wrong & subject.robust.to(right.device)
        subject.keep(new.nonzero().flatten(), images[new])
        ever_wrong |= ~right
    n = len(subject.y)
    clean, noisy = float(subject.correct.double().mean()), n_right / (n * N_DRAWS)
    n_beaten = int((ever_wrong & subject.robust.to(ever_wrong.device)).sum())
    return [
        NOISE.judged(
            subject, clean - noisy,
            f"{100 * noisy:.1f} % under uniform noise ({N_DRAWS} draws an example), {100 * clean:.1f} % without",
        ),
        NOISE_BREAKS.judged(
            subject, n_beaten, f"{n_beaten} of {int(subject.robust.sum())} examples that survived every attack fall to noise"
        ),
    ]  # fmt: skip


def _climb(
    subject: Subject, rows: Tensor, budget: Budget, *, loss: LossName, n_steps: int, history: Tensor | None = None
) -> Tensor:
    """APGD through the backward rule of the subject on the examples at ``rows`` (m,), judged: broken (m,) on the CPU.

    What it breaks inside the subject's own budget is kept.
    """
    counted = subject.counted()
    x, y = subject.x[rows].contiguous(), subject.y[rows]
    rule = APGDRule(budget, loss, n_classes=subject.n_classes, n_steps=n_steps)
    problem = Problem(subject.model, budget, subject.n_classes, subject.seed, subject.batch_size)
    examples = Examples(x, y, subject.indices[rows.cpu()])
    task = AttackTask(f"doubt-{loss}-{n_steps}", counted, problem, examples, subject.logits(x))
    with backward_rule(subject.model, subject.rule), full_float32(counted.device):
        found = climb(task, rule if history is None else Recorded(rule, history), targets=y[:, None])
    points = enforce_budget(found.points.to(x.device), x, budget)
    broken = found.claimed.to(x.device) & (subject.logits(points).argmax(1) != y)
    if budget == subject.budget:
        subject.keep(rows[broken], points[broken])
    return broken.cpu()
