"""Do the outcomes of the evaluation look as they should? Nothing is run for this, and every example counts."""

import numpy as np

from ..attacks import find_attack
from ..engine.comparison import Evaluation
from ..engine.outcomes import TRANSFER
from .check import AUTOATTACK, CARLINI, OWN, Check, Diagnostic
from .subject import Subject

SQUARE = Check("Square beats white-box attacks", 0.002, "share", f"{AUTOATTACK}; {CARLINI}")
TRANSFERRED = Check("transfer beats white-box attacks", 0.01, "share", f"{CARLINI}; the limit is ours")
REFUSED = Check("breaks that float32 refuses", 0.01, "share", OWN)


def check_outcomes(subject: Subject, evaluation: Evaluation) -> list[Diagnostic]:
    """Square against attacks with gradients, transfer against a model's own attacks, the search against the judge."""
    return [_black_box(subject, evaluation), _transfer(subject, evaluation), _refused(subject, evaluation)]


def _black_box(subject: Subject, evaluation: Evaluation) -> Diagnostic:
    """What has no gradient should find nothing that those with gradients have left."""
    if "square" not in evaluation.attacks:
        return SQUARE.not_run(subject.name, "Square was not among the attacks: --attack square")
    white = [a for a in evaluation.attacks if find_attack(a).search != "square"]
    if not white:
        return SQUARE.not_run(subject.name, "no white-box attack was run beside Square")
    outcomes = evaluation.outcomes(subject.name)
    by_square, n = outcomes.broken["square"], len(evaluation.labels)
    alone = by_square & ~np.any([outcomes.broken[attack] for attack in white], axis=0)
    unfaced = any((alone & ~outcomes.faced[attack]).any() for attack in white)
    note = "; the attacks after it did not face these any more" if unfaced else ""
    sentence = f"Square alone broke {int(alone.sum())} of {n} examples{note}"
    return SQUARE.judged(subject.name, float(alone.mean()), sentence, n_broken=int(by_square.sum()))


def _transfer(subject: Subject, evaluation: Evaluation) -> Diagnostic:
    """An image found on another model should break nothing that attacks on this one have left."""
    if evaluation.alpha == 0:
        return TRANSFERRED.not_run(subject.name, "at alpha = 0 the two models are one")
    broken = evaluation.outcomes(subject.name).broken
    alone = broken[TRANSFER] & ~np.any([broken[attack] for attack in evaluation.attacks], axis=0)
    n_alone, n = int(alone.sum()), len(alone)
    sentence = f"images found on another model broke {n_alone} of {n} examples that its own attacks left"
    return TRANSFERRED.judged(subject.name, float(alone.mean()), sentence)


def _refused(subject: Subject, evaluation: Evaluation) -> Diagnostic:
    """Breaks that exist only in the precision of the search; each such example was searched again in float32."""
    steps = [step for step in evaluation.steps(subject.name) if step.attack != TRANSFER]
    n_refused = sum(step.spent.rejected + step.spent.unconfirmed for step in steps)
    claimed = n_refused + sum(step.n_broken for step in steps)
    sentence = f"{n_refused} of {claimed} breaks that the attacks claimed did not hold when judged again in float32"
    return REFUSED.judged(subject.name, n_refused / claimed if claimed else 0.0, sentence, n_refused=n_refused)
