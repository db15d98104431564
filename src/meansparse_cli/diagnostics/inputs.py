"""Is the model given images on the scale it was trained on?"""

from collections.abc import Callable

from torch import Tensor

from ..stats.format import in_points, percent
from ..stats.paired import N_STANDARD_ERRORS
from .check import CARLINI, Check, Diagnostic
from .subject import Subject

NORMALISATION = Check("better with other inputs", 0.05, "points", f"{CARLINI}; the limit is ours")


def _standardised(x: Tensor) -> Tensor:
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True).clamp(min=1e-6)


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "centred, in standard deviations": _standardised,
    "in [-1, 1]": lambda x: 2 * x - 1,
    "in [0, 255]": lambda x: 255 * x,
}
"""What a model may have been trained on that does not normalise inside."""


def check_inputs(subject: Subject) -> Diagnostic:
    """Clean accuracy on inputs of other scales: a model that gains by one lacks its normalisation."""
    clean = subject.is_right(subject.x).double()
    gains, errors = {}, {}
    for words, change in SCALES.items():
        try:
            difference = subject.is_right(change(subject.x)).double() - clean
        except Exception:  # a model may refuse what is not in [0, 1], in whatever way: this scale is not its own
            continue
        gains[words] = float(difference.mean())
        errors[words] = float(difference.std(correction=0)) / len(clean) ** 0.5
    if not gains:
        return NORMALISATION.not_run(subject.name, "the model refuses inputs of every other scale")
    best = max(gains, key=lambda words: gains[words])
    value = gains[best]
    if value <= N_STANDARD_ERRORS * errors[best]:
        value = min(value, 0.0)
    accuracy, gain = percent(float(clean.mean()), digits=1), in_points(gains[best], digits=1)
    sentence = (
        f"pixels from {float(subject.x.min()):.2g} to {float(subject.x.max()):.2g}: clean accuracy {accuracy} %; "
        f"{gain} points with inputs {best}, the best of the scales that models are trained on"
    )
    return NORMALISATION.judged(subject.name, value, sentence, **gains)
