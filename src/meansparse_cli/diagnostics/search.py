"""Had the search converged? Do larger budgets leave nothing, and does random noise find nothing more?"""

from dataclasses import replace

import torch
from torch import Tensor

from ..attacks.apgd import N_STEPS, APGDRule
from ..attacks.budget import enforce_budget, example_generator, uniform_start
from ..attacks.judge import judge
from ..attacks.losses import LossName
from ..attacks.problem import Budget
from ..attacks.queue import AttackTask, Batch, search
from ..errors import AttackError
from ..operator.active import backward_rule
from ..operator.device import full_float32
from ..stats.format import percent
from .subject import Diagnostic, Subject

LAST_PART = 0.1
"""The last steps of a climb, and the part of its rise that may fall into them."""
LOSSES: tuple[LossName, ...] = ("ce", "dlr")
TIMES_EPS, STEPS_OF_LARGE = (2, 4, 8), 40
LARGEST_CHANGE = 0.5
"""With half the pixel range for every pixel, every image can be made the same grey."""
N_DRAWS = 100


class Recorded(APGDRule):
    """APGD that writes down the best loss of each example at each step, where ``history`` (n, n_steps) is given."""

    history: Tensor | None = None

    def move(self, batch: Batch) -> None:
        if self.history is not None:
            self.history[batch["example"], batch["step"]] = batch["best_loss"]
        super().move(batch)


def check_search(subject: Subject) -> list[Diagnostic]:
    """Convergence, larger budgets, noise; where the model has no gradient, noise alone."""
    try:
        searched = [*_converged(subject), _large_eps(subject)]
    except AttackError as error:
        searched = [subject.not_run(check, error.message) for check in ("rising", "more", "large")]
    return [*searched, *_noise(subject)]


def climb_again(
    subject: Subject, rows: Tensor, budget: Budget, *, loss: LossName, n_steps: int, history: Tensor | None = None
) -> Tensor:
    """APGD through the strongest attacks' backward rule on examples at ``rows`` (m,): broken (m,), judged, and kept.

    ``history`` (m, n_steps): filled with the best loss at each step.
    """
    problem, given = replace(subject.problem, budget=budget), subject.examples.at(rows)
    own = replace(given, x=given.x.contiguous())
    rule = Recorded(problem, loss=loss, n_steps=n_steps)
    rule.history = history
    counted = subject.counted()
    task = AttackTask(f"doubt-{loss}-{n_steps}", counted, problem, own, subject.logits(own.x))
    with backward_rule(subject.model, "identity" if subject.bpda else "true"), full_float32(counted.device):
        found = search(task, rule)
    points = enforce_budget(found.points.to(own.x.device), own.x, budget)
    broken = found.claimed.to(own.x.device) & judge(problem, points, own.y)
    if budget == subject.problem.budget:
        subject.keep(rows[broken], points[broken])
    return broken.cpu()


def _converged(subject: Subject) -> list[Diagnostic]:
    """Survivors attacked from another start: is the loss rising at the end, and do twice as many steps break more?"""
    rows = subject.robust.nonzero().flatten()
    if not len(rows):
        return [subject.not_run(check, "no example survived the attacks") for check in ("rising", "more")]
    budget = subject.problem.budget
    again = replace(subject, problem=replace(subject.problem, seed=subject.problem.seed + 1))
    history = torch.full((len(rows), N_STEPS), torch.nan, device=subject.x.device)
    broken = climb_again(again, rows, budget, loss="ce", n_steps=N_STEPS, history=history)
    survived = history.cpu()[~broken]
    total = survived[:, -1] - survived[:, 0]
    late = survived[:, -1] - survived[:, round((1 - LAST_PART) * N_STEPS) - 1]
    rising = (late > LAST_PART * total) & (total > 0)
    share = float(rising.float().mean()) if len(survived) else 0.0
    n_more = broken.clone()
    for loss in LOSSES:
        left = (~n_more).nonzero().flatten()
        if len(left):
            n_more[left] = climb_again(again, rows[left.to(rows.device)], budget, loss=loss, n_steps=2 * N_STEPS)
    n, n_new = len(subject.y), int(n_more.sum())
    counts = {"n_new": n_new, "n_survivors": len(rows), "n_new_same_steps": int(broken.sum())}
    words = {"n_rising": int(rising.sum()), "n": len(survived), "part": LAST_PART, "steps": N_STEPS}
    return [
        subject.judged("rising", share, words),
        subject.judged("more", n_new / n, {"n": n, "steps": N_STEPS, "twice": 2 * N_STEPS}, counts),
    ]


def _large_eps(subject: Subject) -> Diagnostic:
    """APGD at larger and larger budgets, up to one where every image is unrecognisable; what is left shows it blind."""
    rows = subject.correct.nonzero().flatten()
    accuracies, n = {}, len(subject.y)
    own, n_pixels = subject.problem.budget, subject.x[0].numel()
    most = LARGEST_CHANGE * (1 if own.norm == "Linf" else n_pixels**0.5)
    for eps in sorted({min(times * own.eps, most) for times in TIMES_EPS} | {max(most, own.eps)}):
        budget = replace(own, eps=eps)
        if len(rows):
            rows = rows[~climb_again(subject, rows, budget, loss="ce", n_steps=STEPS_OF_LARGE).to(rows.device)]
        accuracies[f"{budget.eps:.4g}"] = len(rows) / n
    *smaller, (largest, value) = accuracies.items()
    at_smaller = ", ".join(f"{percent(accuracy, digits=0)} % at {eps}" for eps, accuracy in smaller)
    words = {"n_right": len(rows), "n": n, "largest": largest, "steps": STEPS_OF_LARGE, "smaller": at_smaller}
    return subject.judged("large", value, words, {"robust_accuracy": accuracies})


def _noise(subject: Subject) -> list[Diagnostic]:
    """Uniform noise in the ball, ``N_DRAWS`` draws an example."""
    n_right, ever_wrong = 0, torch.zeros_like(subject.robust)
    budget, seed, x = subject.problem.budget, subject.problem.seed, subject.x.cpu()
    for draw in range(N_DRAWS):
        drawn = [
            uniform_start(image, example_generator(seed, "noise", draw, int(index)), budget)
            for image, index in zip(x, subject.examples.indices, strict=True)
        ]
        images = enforce_budget(torch.stack(drawn).to(subject.x.device), subject.x, budget)
        right = subject.is_right(images)
        n_right += int(right.sum())
        new = ~right & ~ever_wrong & subject.robust
        subject.keep(new.nonzero().flatten(), images[new])
        ever_wrong |= ~right
    clean, noisy = float(subject.correct.double().mean()), n_right / (len(subject.y) * N_DRAWS)
    words = {"clean": percent(clean, digits=1), "noisy": percent(noisy, digits=1), "n_draws": N_DRAWS}
    return [
        subject.judged("noise", clean - noisy, words),
        subject.judged("beaten", int((ever_wrong & subject.robust).sum()), {"n_robust": int(subject.robust.sum())}),
    ]
