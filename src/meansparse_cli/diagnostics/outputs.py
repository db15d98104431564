"""Doubts about what the model puts out, whatever the attack: noise, other images in the batch, softmax, input range."""

import torch

from ..stats.paired import N_STANDARD_ERRORS
from .doubt import AUTOATTACK, CARLINI, OWN, Check, Doubt, Subject

N_PASSES = 5

RANDOMISED = Check("randomised output", 1e-4, "number", AUTOATTACK)
BATCH_DEPENDENT = Check("depends on the rest of the batch", 1e-3, "number", OWN)
TRAINING = Check("modules in training mode", 0, "count", AUTOATTACK)
NOT_LOGITS = Check("outputs that are probabilities", 0, "share", AUTOATTACK)
NORMALISATION = Check("better with other inputs", 0.05, "points", f"{CARLINI}; the limit is ours")

INPUTS = {
    "centred, in standard deviations": lambda x: (
        (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
    ),
    "in [-1, 1]": lambda x: 2 * x - 1,
    "in [0, 255]": lambda x: 255 * x,
}
"""What a model may have been trained on that does not normalise inside."""


def doubt_outputs(subject: Subject) -> list[Doubt]:
    """Every doubt of this kind. A randomised model differs in any two passes, so what compares two is not run on it."""
    randomised = _randomised(subject)
    if randomised.status == "warn":
        batch = BATCH_DEPENDENT.not_run(subject, "the outputs are randomised, so that no two passes can be compared")
    else:
        batch = _batch_dependent(subject)
    return [randomised, batch, _training(subject), _not_logits(subject), _normalisation(subject)]


def _randomised(subject: Subject) -> Doubt:
    """AutoAttack's check: outputs scaled to length one, the largest distance between any two passes."""
    passes = [torch.nn.functional.normalize(subject.logits(subject.x), dim=1) for _ in range(N_PASSES)]
    largest = max(float((a - b).norm(dim=1).max()) for i, a in enumerate(passes) for b in passes[:i])
    classes = torch.stack([one.argmax(dim=1) for one in passes])
    n_changed = int((classes != classes[0]).any(dim=0).sum())
    return RANDOMISED.judged(
        subject, largest,
        f"{N_PASSES} passes of the same batch differ by up to {largest:.1e} (logits scaled to length one); "
        f"{n_changed} of {len(subject.y)} examples change their class",
        n_classes_changed=n_changed,
    )  # fmt: skip


def _batch_dependent(subject: Subject) -> Doubt:
    """Each image in two batches: with its neighbours, and with others, in reverse, beside noise."""
    x = subject.x[: max(2, subject.batch_size)]
    together = subject.logits(x, batch_size=len(x))
    half = x[: max(1, len(x) // 2)]
    noise = torch.rand(half.shape, generator=torch.Generator().manual_seed(subject.seed)).to(x)
    apart = subject.logits(torch.cat([noise, half.flip(0)]), batch_size=2 * len(half))[len(half) :].flip(0)
    scale = max(float(together.std()), 1e-12)
    difference = (together[: len(half)] - apart).abs().amax(dim=1) / scale
    n_changed = int((together[: len(half)].argmax(1) != apart.argmax(1)).sum())
    largest = float(difference.max())
    return BATCH_DEPENDENT.judged(
        subject, largest,
        f"among other images the logits differ by up to {largest:.1e} of their standard deviation; "
        f"{n_changed} of {len(half)} examples change their class",
        n_classes_changed=n_changed,
    )  # fmt: skip


def _training(subject: Subject) -> Doubt:
    found = [name or type(module).__name__ for name, module in subject.model.named_modules() if module.training]
    some = f": {', '.join(found[:3])}" + (", ..." if len(found) > 3 else "") if found else ""
    return TRAINING.judged(subject, len(found), f"{len(found)} modules stay in training mode after eval(){some}")


def _not_logits(subject: Subject) -> Doubt:
    outputs = subject.logits(subject.x)
    in_range = ((outputs >= 0) & (outputs <= 1)).all(dim=1)
    probabilities = in_range & ((outputs.sum(dim=1) - 1).abs() <= 1e-4)
    share = float(probabilities.float().mean())
    return NOT_LOGITS.judged(
        subject, share,
        f"{int(probabilities.sum())} of {len(outputs)} outputs lie in [0, 1] and sum to one: a softmax inside the model "
        "flattens the losses that attacks climb",
    )  # fmt: skip


def _normalisation(subject: Subject) -> Doubt:
    """A model that gains by inputs of another scale was trained on them: its normalisation belongs inside it."""
    n = len(subject.y)
    clean = subject.logits(subject.x).argmax(1) == subject.y
    gains, errors = {}, {}
    for words, change in INPUTS.items():
        try:
            right = subject.logits(change(subject.x)).argmax(1) == subject.y
        except Exception:  # a model may refuse what is not in [0, 1], in whatever way: this scale is not its own
            continue
        difference = right.double() - clean.double()
        gains[words] = float(difference.mean())
        errors[words] = float(difference.std(correction=0)) / n**0.5
    if not gains:
        return NORMALISATION.not_run(subject, "the model refuses inputs of every other scale")
    best = max(gains, key=lambda words: gains[words])
    value = gains[best]
    if value <= N_STANDARD_ERRORS * errors[best]:
        value = min(value, 0.0)
    accuracy = float(clean.double().mean())
    return NORMALISATION.judged(
        subject, value,
        f"pixels from {float(subject.x.min()):.2g} to {float(subject.x.max()):.2g}: clean accuracy {100 * accuracy:.1f} %; {100 * gains[best]:+.1f} points with inputs {best}, "
        "the best of the scales that models are trained on",
        **gains,
    )  # fmt: skip
