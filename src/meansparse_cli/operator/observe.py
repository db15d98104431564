"""What the operators of a model do to its features: the share that each replaces, one channel before and after."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..errors import ConfigError, SiteError
from ..sites.find import Site
from .insertion import SparsifiedModel
from .module import MeanSparse

Watcher = Callable[[MeanSparse, Tensor], None]
"""Is shown an operator and the features that reach it."""


@dataclass(frozen=True)
class ChannelValues:
    """One channel at one site: what goes in, what comes out, (values,); ``mean`` and ``threshold`` of its operator."""

    before: Tensor
    after: Tensor
    mean: float
    threshold: float


def blocked_shares(model: SparsifiedModel, x: Tensor, *, batch_size: int = 256) -> list[float]:
    """Share of the features of each site that the operator replaces, over images ``x`` (n, channels, height, width)."""
    blocked = [[0, 0] for _ in model.sites]

    def count(i: int) -> Watcher:
        def add(operator: MeanSparse, features: Tensor) -> None:
            mean, threshold = _band(operator, features.ndim)
            if float(operator.alpha) > 0:  # at 0 nothing is replaced, though a constant channel lies on its mean
                blocked[i][0] += int(((features - mean).abs() <= threshold).sum())
            blocked[i][1] += features.numel()

        return add

    _run(model, x, batch_size, {site: count(i) for i, site in enumerate(model.sites)})
    return [n / max(1, of) for n, of in blocked]


def channel_values(
    model: SparsifiedModel, site: Site, channel: int, x: Tensor, *, batch_size: int = 256
) -> ChannelValues:
    """Every value of ``channel`` at ``site`` over images ``x``, before the operator and after it.

    Raises ``ConfigError`` for a channel that the site does not have.
    """
    if not 0 <= channel < site.channels:
        raise ConfigError(f"--channel {channel}: {site.name} has channels 0 to {site.channels - 1}")
    before: list[Tensor] = []
    after: list[Tensor] = []

    def keep(operator: MeanSparse, features: Tensor) -> None:
        for parts, values in ((before, features), (after, type(operator).forward(operator, features))):
            parts.append(values.select(operator.channel_axis, channel).flatten().cpu())

    _run(model, x, batch_size, {site: keep})
    operator = cast(MeanSparse, model.at(site))
    threshold = float(operator.alpha * operator.std[channel])
    return ChannelValues(torch.cat(before), torch.cat(after), float(operator.mean[channel]), threshold)


def site_called(sites: Sequence[Site], name: str) -> Site:
    """The site of that name or index. Raises ``SiteError`` with the names there are."""
    for site in sites:
        if name in (site.name, str(site.index)):
            return site
    names = ", ".join(site.name for site in sites)
    raise SiteError(f"no site {name!r} with an operator", hint=f"--site takes one of {names}")


def _run(model: SparsifiedModel, x: Tensor, batch_size: int, watchers: dict[Site, Watcher]) -> None:
    with torch.no_grad(), _watched(model, watchers):
        for part in x.split(batch_size):
            model(part)


@contextmanager
def _watched(model: SparsifiedModel, watchers: dict[Site, Watcher]) -> Iterator[None]:
    """Show each watcher the input of its site's operator."""

    def hook(watch: Watcher) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda operator, args: watch(operator, args[0])

    handles = [model.at(site).register_forward_pre_hook(hook(watch)) for site, watch in watchers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _band(operator: MeanSparse, n_axes: int) -> tuple[Tensor, Tensor]:
    shape = [1] * n_axes
    shape[operator.channel_axis] = -1
    return operator.mean.view(shape), (operator.alpha * operator.std).view(shape)
