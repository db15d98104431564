"""Are inputs and outputs what attacks take them for: on the scale of training, and logits, always the same?"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..stats.format import in_points, percent
from ..stats.paired import N_STANDARD_ERRORS
from .subject import Diagnostic, Subject

N_PASSES = 5


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "centred, in standard deviations": lambda x: (
        (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
    ),
    "in [-1, 1]": lambda x: 2 * x - 1,
    "in [0, 255]": lambda x: 255 * x,
}
"""What a model may have been trained on that does not normalise inside."""


def check_outputs(subject: Subject) -> list[Diagnostic]:
    """Randomised, dependent on the batch (not asked of a randomised model), in training mode, no logits."""
    randomised = _randomised(subject)
    if randomised.status == "warn":
        batch = subject.not_run("batch", "the outputs are randomised, so that no two passes can be compared")
    else:
        batch = _batch_dependent(subject)
    return [randomised, batch, _training(subject), _probabilities(subject), _inputs(subject)]


def _randomised(subject: Subject) -> Diagnostic:
    """AutoAttack's check: the largest distance between any two passes, logits scaled to length one."""
    passes = [torch.nn.functional.normalize(subject.logits(subject.x), dim=1) for _ in range(N_PASSES)]
    largest = max(float((a - b).norm(dim=1).max()) for i, a in enumerate(passes) for b in passes[:i])
    classes = torch.stack([one.argmax(dim=1) for one in passes])
    n_changed = int((classes != classes[0]).any(dim=0).sum())
    words = {"n_passes": N_PASSES, "n": len(subject.y)}
    return subject.judged("randomised", largest, words, {"n_classes_changed": n_changed})


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
    return subject.judged("batch", largest, {"n": len(half)}, {"n_classes_changed": n_changed})


def _training(subject: Subject) -> Diagnostic:
    found = [name or type(module).__name__ for name, module in subject.model.named_modules() if module.training]
    some = f": {', '.join(found[:3])}" + (", ..." if len(found) > 3 else "") if found else ""
    return subject.judged("training", len(found), {"some": some})


def _probabilities(subject: Subject) -> Diagnostic:
    outputs = subject.logits(subject.x)
    in_range = ((outputs >= 0) & (outputs <= 1)).all(dim=1)
    found = in_range & ((outputs.sum(dim=1) - 1).abs() <= 1e-4)
    return subject.judged(
        "probabilities", float(found.float().mean()), {"n_found": int(found.sum()), "n": len(outputs)}
    )


def _inputs(subject: Subject) -> Diagnostic:
    """Clean accuracy on inputs of other scales: a model that gains by one lacks its normalisation."""
    clean = subject.is_right(subject.x).double()
    gains, errors = {}, {}
    for scale, change in SCALES.items():
        try:
            difference = subject.is_right(change(subject.x)).double() - clean
        except Exception:  # a model may refuse what is not in [0, 1], in whatever way: this scale is not its own
            continue
        gains[scale] = float(difference.mean())
        errors[scale] = float(difference.std(correction=0)) / len(clean) ** 0.5
    if not gains:
        return subject.not_run("inputs", "the model refuses inputs of every other scale")
    best = max(gains, key=lambda scale: gains[scale])
    value = gains[best]
    # one example more or less is seen by no standard error where all say the same
    at_most = max(gains[scale] + N_STANDARD_ERRORS * max(errors[scale], 1 / len(clean)) for scale in gains)
    if value <= N_STANDARD_ERRORS * errors[best]:
        value = min(value, 0.0)
    words = {
        "low": float(subject.x.min()),
        "high": float(subject.x.max()),
        "clean": percent(float(clean.mean()), digits=1),
        "gain": in_points(gains[best], digits=1),
        "best": best,
    }
    return subject.judged("inputs", value, words, gains, at_most=at_most)
