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
from .device import has_kernels

IN_CACHE = 1 << 18
"""Values of a large input that a CPU treats at a time: what passes between the operator's steps stays in the cache."""


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
    band = Band(mean.to(x.dtype), threshold, None if straight_through else soft_edge)
    if _is_plain(x, band):
        return _plain(x, band, straight_through)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _forward(x, band, None)
    replaced: Tensor = _Operator.apply(x, band, straight_through)
    return replaced


@dataclass(frozen=True)
class Band:
    """What is replaced, and by what; all broadcast against the activations. ``edge``: the width of a soft band."""

    mean: Tensor
    threshold: Tensor
    edge: Tensor | None = None

    def of_rows(self, rows: slice, n_rows: int) -> "Band":
        """The band of some rows, where it has a number a row."""

        def part(values: Tensor) -> Tensor:
            return values[rows] if values.ndim == self.mean.ndim > 0 and len(values) == n_rows > 1 else values

        return Band(self.mean, part(self.threshold), None if self.edge is None else part(self.edge))


def _is_plain(x: Tensor, band: Band) -> bool:
    """Has this to be made of PyTorch's own differentiable functions, on the whole of ``x`` at once?

    For compilers and tracers, for ``torch.func``, for a mean that a gradient is asked of, and for devices without a
    kernel of ours.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    if traced or band.mean.requires_grad or not x.ndim or band.mean.ndim not in (0, x.ndim):
        return True
    if not has_kernels(x):
        return x.device.type != "cpu"
    from .kernels import fits  # loads Triton

    return not fits(x, band.mean, band.threshold)


def _plain(x: Tensor, band: Band, straight_through: bool) -> Tensor:
    with torch.no_grad():  # only the mask is kept for the backward pass
        mask = _mask(x, band)
    if not straight_through and band.edge is None:
        return _replaced(x, band.mean, mask)
    with torch.no_grad():
        replaced = _replaced(x, band.mean, mask)
        slope = None if band.edge is None else _soft_slope(x, band)
    return with_gradient_of(replaced, x if slope is None else x * slope)


def _mask(x: Tensor, band: Band) -> Tensor:
    """Bool, true where the mean comes in; on a CPU a number, 0 there and 1 elsewhere, in the type of ``x``.

    PyTorch's comparisons and choices with bool are not vectorised on a CPU: an operator so made takes a sixth of the
    time.
    """
    distance = (x - band.mean).abs_()
    return distance.gt_(band.threshold) if x.device.type == "cpu" else distance <= band.threshold


def _replaced(x: Tensor, mean: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, mean, x) if mask.dtype == torch.bool else torch.lerp(mean, x, mask)  # exact at 0 and 1


def _soft_slope(x: Tensor, band: Band) -> Tensor:
    """The derivative of mean + (x - mean) * sigmoid((|x - mean| - threshold) / edge), in the type of ``x``.

    One where the threshold is below zero, which is how an alpha of 0 is written beside others.
    """
    assert band.edge is not None
    distance = (x.float() - band.mean.float()).abs()
    edge = band.edge.float().clamp(min=torch.finfo(torch.float32).tiny ** 0.5)  # a deviation may be zero
    gate = torch.sigmoid((distance - band.threshold) / edge)
    slope = gate + distance * (gate * (1 - gate)) / edge
    return torch.where(band.threshold < 0, 1.0, slope).to(x.dtype)


def _forward(x: Tensor, band: Band, kept: Tensor | None) -> Tensor:
    """The operator by a kernel, or in pieces that stay in a CPU's cache.

    ``kept``, like ``x``, is filled for the backward pass: with one byte a value, 0 inside the band and 1 outside, or
    with the slope of a soft band.
    """
    if has_kernels(x):
        from .kernels import replaced  # loads Triton

        if kept is not None and band.edge is not None:
            kept.copy_(_soft_slope(x, band))
        return replaced(x, band.mean, band.threshold, kept if band.edge is None else None)
    out = torch.empty_like(x)
    n_rows = len(x)
    at_once = max(1, n_rows if x.numel() <= 4 * IN_CACHE else IN_CACHE * n_rows // x.numel())
    for start in range(0, n_rows, at_once):
        rows = slice(start, start + at_once)
        part, piece = band.of_rows(rows, n_rows), x[rows]
        mask = _mask(piece, part)
        torch.lerp(part.mean, piece, mask, out=out[rows])
        if kept is not None:
            kept[rows] = mask if part.edge is None else _soft_slope(piece, part)
    return out


class _Operator(torch.autograd.Function):
    """The operator; backward the gradient times one byte a value, times a slope, or as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, band: Band, straight_through: bool) -> Tensor:
        ctx.has_factor = not straight_through
        factor = torch.empty_like(x, dtype=torch.bool if band.edge is None else x.dtype) if ctx.has_factor else None
        out = _forward(x, band, factor)  # a tensor of its own: an in-place activation may follow
        if factor is not None:
            ctx.save_for_backward(factor)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if not ctx.has_factor:
            return grads[0], None, None
        (factor,) = ctx.saved_tensors
        return grads[0] * (factor.view(torch.uint8) if factor.dtype == torch.bool else factor), None, None


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
    """The operator's derivative: ``true``, ``identity``, or ``soft`` with a ``temperature`` in std.

    With ``last`` the band narrows while a search goes on: a wide edge finds the way, a narrow one is the model's own.
    """

    name: str
    temperature: float | None = None
    last: float | None = None


TRUE_GRADIENT, IDENTITY = BackwardRule("true"), BackwardRule("identity")


def parse_backward_rule(text: str) -> BackwardRule:
    """``true``, ``identity``, ``soft:T`` or ``soft:TtoL``, for a band that narrows from T to L.

    T and L, above 0, are the width of the band's sigmoid edge in standard deviations.
    """
    if text in (TRUE_GRADIENT.name, IDENTITY.name):
        return BackwardRule(text)
    name, _, numbers = text.partition(":")
    try:
        widths = [float(number) for number in numbers.split("to")]
    except ValueError:
        widths = []
    if name != "soft" or not 1 <= len(widths) <= 2 or not all(0 < width < float("inf") for width in widths):
        raise ConfigError(f"backward rule {text!r} is not known", hint="true, identity, or soft:T such as soft:0.1")
    return BackwardRule(name, *widths)
