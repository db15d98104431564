"""Channel statistics: count, mean and standard deviation, streaming, exact, mergeable.

``pooled`` (the default) is the mean and the population variance over every value a channel ever took, in float64, by
the merge of Chan, Golub and LeVeque (1983): the same whatever the batch size or the order. ``published`` is the
estimator of the reference code and of RobustBench's checkpoints: the plain average over batches of the batch mean and
of the unbiased batch variance, which leaves out the variance between batches and gives a short last batch full weight.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import StatisticsError

Estimator = Literal["pooled", "published"]


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


def update(state: ChannelSums, x: Tensor, channel_axis: int) -> ChannelSums:
    """Add a batch ``x``, of any layout; every axis but ``channel_axis`` is reduced."""
    channels = len(state.mean)
    if x.shape[channel_axis] != channels:
        raise StatisticsError(f"the channel count changed from {channels} to {x.shape[channel_axis]} during the pass")
    if x.numel() == 0:
        return state
    n = x.numel() // channels
    axes = [axis for axis in range(x.ndim) if axis != channel_axis % x.ndim]
    values = x.detach().to(torch.float64)
    if not axes:
        raise StatisticsError("a site's input has no axis beside its channels")
    variance, mean = torch.var_mean(values, dim=axes, correction=0)
    variance, mean = variance.cpu(), mean.cpu()
    if state.estimator == "published":
        if n < 2:
            raise StatisticsError("the published estimator needs at least two values a channel in every batch")
        batch = ChannelSums(1, mean, variance * n / (n - 1), "published")
    else:
        batch = ChannelSums(n, mean, variance * n)
    return merge(state, batch)


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
