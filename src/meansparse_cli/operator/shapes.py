"""Other rules for what lies near the mean: the thresholding rules of wavelet shrinkage, and some that widen.

Every rule maps the distance d of a feature from its mean, and the threshold t, to a new distance; the mean is added
again. ``hard`` is the paper's operator (equation 5), in ``function``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .function import with_gradient_of

HARD = "hard"


def _soft(d: Tensor, t: Tensor) -> Tensor:
    """Donoho & Johnstone 1995: everything moves towards the mean by t."""
    return d - torch.minimum(torch.maximum(d, -t), t)


def _garrote(d: Tensor, t: Tensor) -> Tensor:
    """Gao 1998, the non-negative garrote: d - t^2 / d outside the band, nothing inside."""
    is_outside = d.abs() > t
    return torch.where(is_outside, d - t.square() / torch.where(is_outside, d, 1.0), 0.0)


def _firm(d: Tensor, t: Tensor) -> Tensor:
    """Gao & Bruce 1997: nothing within t / 2, unchanged beyond t, a line between them."""
    return d.sign() * torch.minimum(d.abs(), (2 * d.abs() - t).clamp(min=0))


def _half(d: Tensor, t: Tensor) -> Tensor:
    """Half of the distance is left within the band."""
    return torch.where(d.abs() <= t, d / 2, d)


def _smooth(d: Tensor, t: Tensor) -> Tensor:
    """A band without an edge: d (1 - exp(-(d / t)^2))."""
    return torch.where(t > 0, d * -torch.expm1(-(d / torch.where(t > 0, t, 1.0)).square()), d)


def _edge(d: Tensor, t: Tensor) -> Tensor:
    """To the nearer edge of the band: small distances become t."""
    return torch.where(d.abs() <= t, d.sign() * t, d)


def _widen(d: Tensor, t: Tensor) -> Tensor:
    """The opposite of ``firm``: twice the distance within t / 2, the band's edge beyond it."""
    return torch.where(d.abs() <= t, torch.minimum(torch.maximum(2 * d, -t), t), d)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "soft": _soft,
    "garrote": _garrote,
    "firm": _firm,
    "half": _half,
    "smooth": _smooth,
    "edge": _edge,
    "widen": _widen,
}


def reshaped(
    x: Tensor,
    mean: Tensor,
    threshold: Tensor,
    shape: str,
    *,
    straight_through: bool = False,
    soft_edge: Tensor | None = None,
) -> Tensor:
    """``function.mean_sparsify`` by the rule ``shape``, a key of ``SHAPES``; a threshold below zero leaves x as it is.

    Its own gradient is autograd's. With ``soft_edge``, in activation units, it is the slope across that distance to
    either side, so that a step has one too.
    """
    mean, t = mean.to(x.dtype), threshold.clamp(min=0).to(x.dtype)

    def out(moved: Tensor) -> Tensor:
        return torch.where(threshold < 0, moved, mean + SHAPES[shape](moved - mean, t))

    if not straight_through and soft_edge is None:
        return out(x)
    with torch.no_grad():
        value = out(x)
    if soft_edge is None:
        return with_gradient_of(value, x)
    with torch.no_grad():
        half = soft_edge.clamp(min=torch.finfo(torch.float32).tiny ** 0.5).to(x.dtype)
        slope = (out(x + half) - out(x - half)) / (2 * half)
        slope = torch.where((soft_edge > 0) & (threshold >= 0), slope, 1.0)  # else: without variance, or the base
    return with_gradient_of(value, x * slope)
