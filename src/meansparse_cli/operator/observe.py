"""Operators watched at work: the share of features that each replaces, one channel before and after."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError, SiteError
from ..sites.find import Site
from .active import operators_of
from .insertion import SparsifiedModel
from .module import MeanSparse


@dataclass(frozen=True)
class ChannelValues:
    """One channel at one site: what goes in, what comes out, (values,); ``mean`` and ``threshold`` of its operator."""

    before: Tensor
    after: Tensor
    mean: float
    threshold: float


def blocked_shares(model: SparsifiedModel, x: Tensor, *, batch_size: int = 256) -> list[float]:
    """Share of the features of each site that the operator replaces, over images ``x`` (n, channels, height, width)."""
    operators = [cast(MeanSparse, model.at(site)) for site in model.sites]
    n_blocked: dict[MeanSparse, list[Tensor]] = {operator: [] for operator in operators}
    n_features = dict.fromkeys(operators, 0)

    def count(operator: MeanSparse, features: Tensor) -> None:
        n_blocked[operator].append(operator.masked(features).sum())  # a number that no GPU is waited for
        n_features[operator] += features.numel()

    _run(model, x, batch_size, count)
    return [sum(map(int, n_blocked[operator])) / max(1, n_features[operator]) for operator in operators]


def channel_values(
    model: SparsifiedModel, site: Site, channel: int, x: Tensor, *, batch_size: int = 256
) -> ChannelValues:
    """Every value of ``channel`` at ``site`` over images ``x``, before the operator and after it.

    Raises ``ConfigError`` for a channel that the site does not have.
    """
    if not 0 <= channel < site.channels:
        raise ConfigError(f"--channel {channel}: {site.name} has channels 0 to {site.channels - 1}")
    here = cast(MeanSparse, model.at(site))
    before: list[Tensor] = []
    after: list[Tensor] = []

    def keep(operator: MeanSparse, features: Tensor) -> None:
        if operator is here:
            for parts, values in ((before, features), (after, type(operator).forward(operator, features))):
                parts.append(values.select(operator.channel_axis, channel).flatten().cpu())

    _run(model, x, batch_size, keep)
    threshold = float(here.threshold(here.std)[channel])
    return ChannelValues(torch.cat(before), torch.cat(after), float(here.mean[channel]), threshold)


def site_called(sites: Sequence[Site], name: str) -> Site:
    """The site of that name or index. Raises ``SiteError`` with the names there are."""
    for site in sites:
        if name in (site.name, str(site.index)):
            return site
    names = ", ".join(site.name for site in sites)
    raise SiteError(f"no site {name!r} with an operator", hint=f"--site takes one of {names}")


@contextmanager
def inputs_shown(model: nn.Module, watch: Callable[[MeanSparse, Tensor], object]) -> Iterator[None]:
    """Show ``watch`` every operator and the features that reach it, in the order of each forward pass."""

    def hook(operator: nn.Module, args: tuple[Tensor, ...]) -> None:
        watch(cast(MeanSparse, operator), args[0])

    handles = [operator.register_forward_pre_hook(hook) for operator in operators_of(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, x: Tensor, batch_size: int, watch: Callable[[MeanSparse, Tensor], object]) -> None:
    with torch.no_grad(), inputs_shown(model, watch):
        for part in x.split(batch_size):
            model(part)
