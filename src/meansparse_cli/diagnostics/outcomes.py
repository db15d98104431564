"""Doubts that the outcomes of the evaluation themselves raise; nothing is run for these, and every example counts."""

import numpy as np

from ..attacks import find_attack
from ..engine.evaluation import TRANSFER, Evaluation
from .doubt import AUTOATTACK, CARLINI, OWN, Check, Doubt, Subject

SQUARE = Check("Square beats white-box attacks", 0.002, "share", f"{AUTOATTACK}; {CARLINI}")
TRANSFERRED = Check("transfer beats white-box attacks", 0.01, "share", f"{CARLINI}; the limit is ours")
REFUSED = Check("breaks that float32 refuses", 0.01, "share", OWN)


def doubt_outcomes(subject: Subject, evaluation: Evaluation) -> list[Doubt]:
    """Every doubt of this kind."""
    return [_black_box(subject, evaluation), _transfer(subject, evaluation), _refused(subject, evaluation)]


def _black_box(subject: Subject, evaluation: Evaluation) -> Doubt:
    """What has no gradient should find nothing that those with gradients have left."""
    if "square" not in evaluation.attacks:
        return SQUARE.not_run(subject, "Square was not among the attacks: --attack square")
    white = [a for a in evaluation.attacks if find_attack(a).search != "square"]
    if not white:
        return SQUARE.not_run(subject, "no white-box attack was run beside Square")
    outcomes = evaluation.outcomes(subject.name)
    by_white = np.any([outcomes.broken[attack] for attack in white], axis=0)
    alone = outcomes.broken["square"] & ~by_white
    unfaced = sum(int((alone & ~outcomes.faced[attack]).any()) for attack in white)
    n = len(evaluation.labels)
    note = "; the attacks after it did not face these any more" if unfaced else ""
    return SQUARE.judged(
        subject, float(alone.mean()),
        f"Square alone broke {int(alone.sum())} of {n} examples{note}",
        n_broken=int(outcomes.broken["square"].sum()),
    )  # fmt: skip


def _transfer(subject: Subject, evaluation: Evaluation) -> Doubt:
    """An image found on another model should break nothing that attacks on this one have left."""
    if evaluation.alpha == 0:
        return TRANSFERRED.not_run(subject, "at alpha = 0 the two models are one")
    outcomes = evaluation.outcomes(subject.name)
    own = np.any([outcomes.broken[attack] for attack in evaluation.attacks], axis=0)
    alone = outcomes.broken[TRANSFER] & ~own
    return TRANSFERRED.judged(
        subject, float(alone.mean()),
        f"images found on another model broke {int(alone.sum())} of {len(alone)} examples that its own attacks left",
    )  # fmt: skip


def _refused(subject: Subject, evaluation: Evaluation) -> Doubt:
    """Breaks that exist only in the precision of the search; each such example was searched again in float32."""
    steps = [step for step in evaluation.steps(subject.name) if step.attack != TRANSFER]
    n_broken = sum(step.n_broken for step in steps)
    n_refused = sum(step.spent.rejected + step.spent.unconfirmed for step in steps)
    claimed = n_broken + n_refused
    return REFUSED.judged(
        subject, n_refused / claimed if claimed else 0.0,
        f"{n_refused} of {claimed} breaks that the attacks claimed did not hold when judged again in float32",
        n_refused=n_refused,
    )  # fmt: skip
