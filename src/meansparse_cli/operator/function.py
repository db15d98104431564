"""The MeanSparse operator as a function, and what a gradient meets there.

out = mean where abs(in - mean) <= threshold, else in (paper, section 3; per channel, element-wise), threshold = alpha *
std. The gradient is zero inside the band and one outside. BPDA attacks (Athalye et al. 2018) put another derivative in
its place while the forward pass stays as it is: ``BackwardRule``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError


def mean_sparsify(
    x: Tensor, mean: Tensor, threshold: Tensor, *, straight_through: bool = False, soft_edge: Tensor | None = None
) -> Tensor:
    """Replace by ``mean`` what lies within ``threshold`` of it (paper, equation for a_out).

    ``mean`` and ``threshold`` (in activation units) broadcast against ``x``, of any shape. NaN stays NaN, infinity may
    become NaN. The values are the same whatever the gradient: that of the operator, one everywhere with
    ``straight_through``, or that of a band whose edge is a sigmoid of width ``soft_edge``, in activation units.

    >>> mean_sparsify(torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor(0.5), torch.tensor(0.2))
    tensor([0.2000, 0.5000, 0.5000, 0.8000])
    """
    mean = mean.to(x.dtype)
    with torch.no_grad():  # only the mask is kept for the backward pass
        mask = _mask(x, mean, threshold)
        slope = None if soft_edge is None or straight_through else _soft_slope(x, mean, threshold, soft_edge)
    if straight_through or slope is not None:
        replaced: Tensor = _ReplacedGradient.apply(x, mean, mask, slope)
        return replaced
    return _replaced(x, mean, mask)


def _mask(x: Tensor, mean: Tensor, threshold: Tensor) -> Tensor:
    """Bool, true where the mean comes in; on a CPU a number, 0 there and 1 elsewhere, in the type of ``x``.

    PyTorch's comparisons and choices with bool are not vectorised on a CPU: an operator so made takes a sixth of the
    time.
    """
    distance = (x - mean).abs_()
    return distance.gt_(threshold) if x.device.type == "cpu" else distance <= threshold


def _replaced(x: Tensor, mean: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, mean, x) if mask.dtype == torch.bool else torch.lerp(mean, x, mask)  # exact at 0 and 1


def _soft_slope(x: Tensor, mean: Tensor, threshold: Tensor, edge: Tensor) -> Tensor:
    """The derivative of mean + (x - mean) * sigmoid((|x - mean| - threshold) / edge), in the type of ``x``.

    One where the threshold is below zero, which is how an alpha of 0 is written beside others.
    """
    distance = (x.float() - mean.float()).abs()
    edge = edge.float().clamp(min=torch.finfo(torch.float32).tiny ** 0.5)  # a channel may have a deviation of zero
    gate = torch.sigmoid((distance - threshold) / edge)
    slope = gate + distance * (gate * (1 - gate)) / edge
    return torch.where(threshold < 0, 1.0, slope).to(x.dtype)


class _ReplacedGradient(torch.autograd.Function):
    """The operator forward; backward the gradient times ``slope``, or the gradient itself where that is None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, mask: Tensor, slope: Tensor | None) -> Tensor:
        ctx.has_slope = slope is not None
        if slope is not None:
            ctx.save_for_backward(slope)
        return _replaced(x, mean, mask)  # a tensor of its own: an in-place activation may follow

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return (grads[0] * ctx.saved_tensors[0] if ctx.has_slope else grads[0]), None, None, None


class _ValueAndGradient(torch.autograd.Function):
    """The first argument's values with the second one's gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0]


def with_gradient_of(value: Tensor, source: Tensor) -> Tensor:
    """``value``, bit by bit, with the gradient of ``source``, of the same shape."""
    out: Tensor = _ValueAndGradient.apply(value, source)
    return out


@dataclass(frozen=True)
class BackwardRule:
    """The operator's derivative: ``true``, ``identity``, or ``soft`` with a ``temperature`` in std."""

    name: str
    temperature: float | None = None


TRUE_GRADIENT, IDENTITY = BackwardRule("true"), BackwardRule("identity")


def parse_backward_rule(text: str) -> BackwardRule:
    """``true``, ``identity`` or ``soft:T``, T > 0 the width of the band's sigmoid edge in standard deviations."""
    if text in (TRUE_GRADIENT.name, IDENTITY.name):
        return BackwardRule(text)
    name, _, number = text.partition(":")
    try:
        temperature = float(number)
    except ValueError:
        temperature = 0.0
    if name != "soft" or not 0 < temperature < float("inf"):
        raise ConfigError(f"backward rule {text!r} is not known", hint="true, identity, or soft:T such as soft:0.1")
    return BackwardRule(name, temperature)
