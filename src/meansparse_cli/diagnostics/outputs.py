"""Are the outputs what attacks take them for: logits, the same in every pass, whatever else is in the batch?"""

import torch

from .check import AUTOATTACK, OWN, Check, Diagnostic
from .subject import Subject

N_PASSES = 5

RANDOMISED = Check("randomised output", 1e-4, "number", AUTOATTACK)
BATCH_DEPENDENT = Check("depends on the rest of the batch", 1e-3, "number", OWN)
TRAINING = Check("modules in training mode", 0, "count", AUTOATTACK)
NOT_LOGITS = Check("outputs that are probabilities", 0, "share", AUTOATTACK)


def check_outputs(subject: Subject) -> list[Diagnostic]:
    """Randomised, dependent on the batch (not asked of a randomised model), in training mode, no logits."""
    randomised = _randomised(subject)
    if randomised.status == "warn":
        why = "the outputs are randomised, so that no two passes can be compared"
        batch = BATCH_DEPENDENT.not_run(subject.name, why)
    else:
        batch = _batch_dependent(subject)
    return [randomised, batch, _training(subject), _not_logits(subject)]


def _randomised(subject: Subject) -> Diagnostic:
    """AutoAttack's check: the largest distance between any two passes, logits scaled to length one."""
    passes = [torch.nn.functional.normalize(subject.logits(subject.x), dim=1) for _ in range(N_PASSES)]
    largest = max(float((a - b).norm(dim=1).max()) for i, a in enumerate(passes) for b in passes[:i])
    classes = torch.stack([one.argmax(dim=1) for one in passes])
    n_changed = int((classes != classes[0]).any(dim=0).sum())
    sentence = (
        f"{N_PASSES} passes of the same batch differ by up to {largest:.1e} (logits scaled to length one); "
        f"{n_changed} of {len(subject.y)} examples change their class"
    )
    return RANDOMISED.judged(subject.name, largest, sentence, n_classes_changed=n_changed)


def _batch_dependent(subject: Subject) -> Diagnostic:
    """Each image in two batches: with its neighbours, and with others, in reverse, beside noise."""
    x = subject.x[: max(2, subject.problem.batch_size)]
    together = subject.logits(x, batch_size=len(x))
    half = x[: max(1, len(x) // 2)]
    noise = torch.rand(half.shape, generator=torch.Generator().manual_seed(subject.problem.seed)).to(x)
    apart = subject.logits(torch.cat([noise, half.flip(0)]), batch_size=2 * len(half))[len(half) :].flip(0)
    scale = max(float(together.std()), 1e-12)
    largest = float(((together[: len(half)] - apart).abs().amax(dim=1) / scale).max())
    n_changed = int((together[: len(half)].argmax(1) != apart.argmax(1)).sum())
    sentence = (
        f"among other images the logits differ by up to {largest:.1e} of their standard deviation; "
        f"{n_changed} of {len(half)} examples change their class"
    )
    return BATCH_DEPENDENT.judged(subject.name, largest, sentence, n_classes_changed=n_changed)


def _training(subject: Subject) -> Diagnostic:
    found = [name or type(module).__name__ for name, module in subject.model.named_modules() if module.training]
    some = f": {', '.join(found[:3])}" + (", ..." if len(found) > 3 else "") if found else ""
    return TRAINING.judged(subject.name, len(found), f"{len(found)} modules stay in training mode after eval(){some}")


def _not_logits(subject: Subject) -> Diagnostic:
    outputs = subject.logits(subject.x)
    in_range = ((outputs >= 0) & (outputs <= 1)).all(dim=1)
    probabilities = in_range & ((outputs.sum(dim=1) - 1).abs() <= 1e-4)
    sentence = (
        f"{int(probabilities.sum())} of {len(outputs)} outputs lie in [0, 1] and sum to one: "
        "a softmax inside the model flattens the losses that attacks climb"
    )
    return NOT_LOGITS.judged(subject.name, float(probabilities.float().mean()), sentence)
