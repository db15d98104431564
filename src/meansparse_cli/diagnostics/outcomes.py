"""Do the outcomes of the evaluation look as they should? Nothing is run for this, and every example counts."""

import numpy as np

from ..attacks import find_attack
from ..engine.comparison import Evaluation
from ..engine.outcomes import TRANSFER
from .subject import Diagnostic, Subject


def check_outcomes(subject: Subject, evaluation: Evaluation) -> list[Diagnostic]:
    """Square against attacks with gradients, transfer against a model's own attacks, the search against the judge."""
    return [_black_box(subject, evaluation), _transfer(subject, evaluation), _refused(subject, evaluation)]


def _black_box(subject: Subject, evaluation: Evaluation) -> Diagnostic:
    """What has no gradient should find nothing that those with gradients have left."""
    if "square" not in evaluation.attacks:
        return subject.not_run("square", "Square was not among the attacks: --attack square")
    white = [a for a in evaluation.attacks if find_attack(a).search != "square"]
    if not white:
        return subject.not_run("square", "no white-box attack was run beside Square")
    outcomes = evaluation.outcomes(subject.name)
    by_square = outcomes.broken["square"]
    alone = by_square & ~np.any([outcomes.broken[attack] for attack in white], axis=0)
    is_unfaced = any((alone & ~outcomes.faced[attack]).any() for attack in white)
    unfaced = "; the attacks after it did not face these any more" if is_unfaced else ""
    words = {"n_alone": int(alone.sum()), "n": len(alone), "unfaced": unfaced}
    return subject.judged("square", float(alone.mean()), words, {"n_broken": int(by_square.sum())})


def _transfer(subject: Subject, evaluation: Evaluation) -> Diagnostic:
    """An image found on another model should break nothing that attacks on this one have left."""
    if evaluation.alpha == 0:
        return subject.not_run("transfer", "at alpha = 0 the two models are one")
    broken = evaluation.outcomes(subject.name).broken
    alone = broken[TRANSFER] & ~np.any([broken[attack] for attack in evaluation.attacks], axis=0)
    return subject.judged("transfer", float(alone.mean()), {"n_alone": int(alone.sum()), "n": len(alone)})


def _refused(subject: Subject, evaluation: Evaluation) -> Diagnostic:
    """Breaks that exist only in the precision of the search; each such example was searched again in float32."""
    steps = [step for step in evaluation.steps(subject.name) if step.attack != TRANSFER]
    n_refused = sum(step.spent.rejected + step.spent.unconfirmed for step in steps)
    claimed = n_refused + sum(step.n_broken for step in steps)
    share = n_refused / claimed if claimed else 0.0
    return subject.judged("refused", share, {"claimed": claimed}, {"n_refused": n_refused})
