"""Channel statistics: count, mean and standard deviation, streaming, exact, mergeable.

``pooled`` (the default) is the mean and the population variance over every value a channel ever took, in float64, by
the merge of Chan, Golub and LeVeque (1983): the same whatever the batch size or the order. ``published`` is the
estimator of the reference code and of RobustBench's checkpoints: the plain average over batches of the batch mean and
of the unbiased batch variance, which leaves out the variance between batches and gives a short last batch full weight.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import StatisticsError
from .device import has_kernels

Estimator = Literal["pooled", "published"]
IN_CACHE, IN_FLIGHT = 1 << 18, 1 << 24
"""Values that are converted to float64 at a time: on a CPU, and on a GPU, which small pieces would leave idle."""


@dataclass(frozen=True)
class ChannelSums:
    """Running state of one site; tensors are float64 of shape (channels,).

    For ``pooled``, ``count`` is the number of values a channel took and ``spread`` the sum of squared deviations from
    ``mean``. For ``published``, ``count`` is the number of batches and ``spread`` the average of their variances.
    """

    count: int
    mean: Tensor
    spread: Tensor
    estimator: Estimator = "pooled"


@dataclass(frozen=True)
class ChannelStatistics:
    """The numbers of an operator: ``mean`` and ``std`` (channels,), float64; ``count`` as in ChannelSums."""

    count: int
    mean: Tensor
    std: Tensor


def empty(channels: int, estimator: Estimator = "pooled") -> ChannelSums:
    """The state before any data."""
    return ChannelSums(
        0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64), estimator
    )


def of_batch(x: Tensor, channel_axis: int, channels: int, estimator: Estimator = "pooled") -> ChannelSums:
    """The state after ``x`` alone, on the device of ``x``, which is not waited for.

    Values are taken relative to the first of their channel, so that a mean far above the deviation costs no digits.
    """
    if x.shape[channel_axis] != channels:
        raise StatisticsError(f"the channel count changed from {channels} to {x.shape[channel_axis]} during the pass")
    if x.ndim < 2:
        raise StatisticsError("a site's input has no axis beside its channels")
    if x.numel() == 0:
        return empty(channels, estimator)
    axis = channel_axis % x.ndim
    values = x.detach().reshape(math.prod(x.shape[:axis]), channels, -1)
    shift = values[0, :, 0].to(torch.float64)
    total, squares = _shifted_sums(values, shift)
    n = x.numel() // channels
    mean, spread = shift + total / n, (squares - total.square() / n).clamp(min=0)
    if estimator == "pooled":
        return ChannelSums(n, mean, spread)
    if n < 2:
        raise StatisticsError("the published estimator needs at least two values a channel in every batch")
    return ChannelSums(1, mean, spread / (n - 1), "published")


def _shifted_sums(values: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of ``values - shift`` and of its square over (outer, channels, inner): two of (channels,), float64.

    In pieces that stay in the cache: on a CPU a float64 copy of the whole takes seven times as long.
    """
    if has_kernels(values):
        from .kernels import shifted_sums  # loads Triton

        return shifted_sums(values, shift)
    total, squares = torch.zeros_like(shift), torch.zeros_like(shift)
    for piece in _pieces(values, IN_CACHE if values.device.type == "cpu" else IN_FLIGHT):
        part = piece.to(torch.float64, copy=True).sub_(shift.unsqueeze(1))
        total += part.sum((0, 2))
        squares += part.square_().sum((0, 2))
    return total, squares


def _pieces(values: Tensor, at_most: int) -> Iterator[Tensor]:
    """``values`` (outer, channels, inner) in views of about ``at_most`` values each."""
    _, channels, inner = values.shape
    for rows in values.split(max(1, at_most // (channels * inner))):
        yield from rows.split(max(1, at_most // (len(rows) * channels)), dim=2)


def on_cpu(parts: Sequence[ChannelSums]) -> list[ChannelSums]:
    """These states on the CPU, with one wait for the device all together."""
    device = parts[0].mean.device
    numbers = torch.cat([tensor.to(device) for part in parts for tensor in (part.mean, part.spread)]).cpu()
    tensors = iter(numbers.split([len(part.mean) for part in parts for _ in range(2)]))
    return [replace(part, mean=next(tensors), spread=next(tensors)) for part in parts]


def merge(a: ChannelSums, b: ChannelSums) -> ChannelSums:
    """The state after the data of both, from whichever batch, process or machine."""
    if a.estimator != b.estimator:
        raise StatisticsError(f"cannot merge {a.estimator} with {b.estimator} statistics")
    if a.count == 0 or b.count == 0:
        return b if a.count == 0 else a
    count = a.count + b.count
    delta = b.mean - a.mean
    mean = a.mean + delta * (b.count / count)
    if a.estimator == "published":
        return ChannelSums(count, mean, a.spread + (b.spread - a.spread) * (b.count / count), "published")
    spread = a.spread + b.spread + delta.square() * (a.count * b.count / count)
    return ChannelSums(count, mean, spread)


def compute(state: ChannelSums, where: str = "site") -> ChannelStatistics:
    """Mean and standard deviation; refuses a site without data, and NaN or infinity."""
    if state.count == 0:
        raise StatisticsError(f"{where} saw no data", hint="raise --n-examples, or leave this site out")
    variance = state.spread if state.estimator == "published" else state.spread / state.count
    if not (torch.isfinite(state.mean).all() and torch.isfinite(variance).all()):
        bad = int((~(torch.isfinite(state.mean) & torch.isfinite(variance))).sum())
        raise StatisticsError(
            f"{where}: {bad} of {len(variance)} channels are NaN or infinite",
            hint="the weights may be corrupt, or the images not in [0, 1]",
        )
    return ChannelStatistics(state.count, state.mean, variance.sqrt())
