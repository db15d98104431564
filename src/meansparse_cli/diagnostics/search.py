"""Had the search converged? And, with ``budgets`` and ``noise``: do other budgets give what they must?"""

from dataclasses import replace

import torch

from ..attacks.apgd import N_STEPS
from ..attacks.losses import LossName
from ..errors import AttackError
from .budgets import LARGE_EPS, check_budgets
from .check import CARLINI, PINTOR, Check, Diagnostic
from .climb import climb_again
from .noise import check_noise
from .subject import Subject

RISING = Check("loss still rising at the last step", 0.1, "share", f"{PINTOR}; the limit is ours")
MORE = Check("more steps and another start", 0, "share", f"{CARLINI}; {PINTOR}")

LAST_PART = 0.1
"""The last steps of a climb, and the part of its rise that may fall into them."""
LOSSES: tuple[LossName, ...] = ("ce", "dlr")


def check_search(subject: Subject) -> list[Diagnostic]:
    """Convergence, larger budgets, noise; where the model has no gradient, noise alone."""
    try:
        searched = [*_converged(subject), check_budgets(subject)]
    except AttackError as error:
        searched = [check.not_run(subject.name, error.message) for check in (RISING, MORE, LARGE_EPS)]
    return [*searched, *check_noise(subject)]


def _converged(subject: Subject) -> list[Diagnostic]:
    """Survivors attacked from another start: is the loss rising at the end, and do twice as many steps break more?"""
    rows = subject.robust.nonzero().flatten()
    if not len(rows):
        return [check.not_run(subject.name, "no example survived the attacks") for check in (RISING, MORE)]
    budget = subject.problem.budget
    again = replace(subject, problem=replace(subject.problem, seed=subject.problem.seed + 1))
    history = torch.full((len(rows), N_STEPS), torch.nan, device=subject.x.device)
    broken = climb_again(again, rows, budget, loss="ce", n_steps=N_STEPS, history=history)
    survived = history.cpu()[~broken]
    total = survived[:, -1] - survived[:, 0]
    late = survived[:, -1] - survived[:, round((1 - LAST_PART) * N_STEPS) - 1]
    rising = (late > LAST_PART * total) & (total > 0)
    n_more = broken.clone()
    for loss in LOSSES:
        left = (~n_more).nonzero().flatten()
        if len(left):
            n_more[left] = climb_again(again, rows[left.to(rows.device)], budget, loss=loss, n_steps=2 * N_STEPS)
    n, n_new = len(subject.y), int(n_more.sum())
    still_rising = (
        f"{int(rising.sum())} of {len(survived)} surviving examples gain more than {LAST_PART:.0%} of their rise in "
        f"the last {LAST_PART:.0%} of {N_STEPS} steps"
    )
    broke_more = (
        f"APGD from another start, {N_STEPS} and {2 * N_STEPS} steps, broke {n_new} more of {n} examples "
        f"({len(rows)} had survived)"
    )
    counts = {"n_new": n_new, "n_survivors": len(rows), "n_new_same_steps": int(broken.sum())}
    share = float(rising.float().mean()) if len(survived) else 0.0
    return [
        RISING.judged(subject.name, share, still_rising),
        MORE.judged(subject.name, n_new / n, broke_more, **counts),
    ]
