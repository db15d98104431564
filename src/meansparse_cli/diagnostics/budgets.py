"""Does accuracy fall to zero at a budget in which every image can be made unrecognisable?"""

from ..attacks.problem import Budget
from ..stats.format import percent
from .check import CARLINI, PINTOR, Check, Diagnostic
from .climb import climb_again
from .subject import Subject

LARGE_EPS = Check("robust accuracy at a large eps", 0.02, "share", f"{CARLINI}; {PINTOR}")

N_STEPS = 40
TIMES_EPS = (2, 4, 8)
LARGEST_CHANGE = 0.5
"""With half the pixel range for every pixel, every image can be made the same grey."""


def check_budgets(subject: Subject) -> Diagnostic:
    """APGD at larger and larger budgets, up to that; what is still right there shows that the attack is blind."""
    rows = subject.correct.nonzero().flatten()
    accuracies, n = {}, len(subject.y)
    for budget in _large_budgets(subject.problem.budget, subject.x[0].numel()):
        if len(rows):
            rows = rows[~climb_again(subject, rows, budget, loss="ce", n_steps=N_STEPS).to(rows.device)]
        accuracies[f"{budget.eps:.4g}"] = len(rows) / n
    *smaller, (largest, value) = accuracies.items()
    sentence = (
        f"{len(rows)} of {n} examples are still right at eps {largest}, where every image can be made unrecognisable "
        f"({N_STEPS} steps of APGD); at smaller ones: "
        + ", ".join(f"{percent(accuracy, digits=0)} % at {eps}" for eps, accuracy in smaller)
    )
    return LARGE_EPS.judged(subject.name, value, sentence, robust_accuracy=accuracies)


def _large_budgets(budget: Budget, n_pixels: int) -> list[Budget]:
    most = LARGEST_CHANGE * (1 if budget.norm == "Linf" else n_pixels**0.5)
    sizes = {min(times * budget.eps, most) for times in TIMES_EPS} | {max(most, budget.eps)}
    return [Budget(budget.norm, eps) for eps in sorted(sizes)]
