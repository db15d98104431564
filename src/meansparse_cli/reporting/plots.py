"""Pictures of what the operator does: the share of features it blocks at each site, and one channel before and after.

The second is the paper's Figure 1. Both are drawn from held-out images through the model as the run's checkpoint has it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..errors import ConfigError, SiteError
from ..operator.insertion import SparsifiedModel
from ..operator.module import MeanSparse
from ..sites.find import Site
from .curve import CLEAN, ROBUST, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_BINS = 101


@dataclass(frozen=True)
class ChannelValues:
    """One channel at one site: what goes in and what comes out, (values,); ``mean`` and ``threshold`` of its operator."""

    before: Tensor
    after: Tensor
    mean: float
    threshold: float


def blocked_shares(model: SparsifiedModel, x: Tensor, *, batch_size: int = 256) -> list[float]:
    """Share of the features of each site that the operator replaces, over images ``x`` (n, channels, height, width)."""
    blocked = [[0, 0] for _ in model.sites]

    def count(i: int) -> Callable[[MeanSparse, Tensor], None]:
        def add(operator: MeanSparse, features: Tensor) -> None:
            mean, threshold = _band(operator, features.ndim)
            # at alpha = 0 nothing is replaced, though a constant channel lies on its mean
            inside = (
                (features - mean).abs() <= threshold
                if float(operator.alpha) > 0
                else features.new_zeros(1, dtype=torch.bool)
            )
            blocked[i][0] += int(inside.sum())
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
    parts: list[tuple[Tensor, Tensor]] = []

    def keep(operator: MeanSparse, features: Tensor) -> None:
        after = type(operator).forward(operator, features)
        parts.append(
            (
                features.select(operator.channel_axis, channel).flatten().cpu(),
                after.select(operator.channel_axis, channel).flatten().cpu(),
            )
        )

    _run(model, x, batch_size, {site: keep})
    operator = cast(MeanSparse, model.at(site))
    return ChannelValues(
        torch.cat([before for before, _ in parts]), torch.cat([after for _, after in parts]),
        float(operator.mean[channel]), float(operator.alpha * operator.std[channel]),
    )  # fmt: skip


def site_called(sites: Sequence[Site], name: str) -> Site:
    """The site of that name or index. Raises ``SiteError`` with the names there are."""
    for site in sites:
        if name in (site.name, str(site.index)):
            return site
    raise SiteError(
        f"no site {name!r} with an operator", hint=f"--site takes one of {', '.join(s.name for s in sites)}"
    )


def draw_blocked(shares: Sequence[float], sites: Sequence[Site], *, title: str, png: Path, svg: Path) -> None:
    """Bars, one a site, in the order of the forward pass."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        places = range(len(sites))
        axes.barh(places, [100 * share for share in shares], color=CLEAN, height=0.7)
        for place, share in zip(places, shares, strict=True):
            axes.text(100 * share, place, f" {100 * share:.1f}", va="center", fontsize=8)
        axes.set_yticks(list(places), [f"{site.index}  {site.name}" for site in sites], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("features that the operator replaces (%)")
        axes.margins(x=0.1)
        figure.suptitle(title, x=0.02, ha="left", fontsize=11)

    save_figure(draw, (7.2, max(2.5, 0.26 * len(sites) + 1.2)), png, svg)


def draw_histogram(values: ChannelValues, *, title: str, png: Path, svg: Path) -> None:
    """The channel's values before and after, one above the other on the same bins, with the band and its centre."""
    low, high = float(values.before.min()), float(values.before.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    share = float((values.before != values.after).double().mean())

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(2, 1, sharex=True)
        rows = (("before", values.before, CLEAN), ("after", values.after, ROBUST))
        for axes, (name, data, colour) in zip(panels, rows, strict=True):
            counts = torch.histc(data.float(), N_BINS, low, high)
            edges = torch.linspace(low, high, N_BINS + 1)
            heights = (100 * counts / max(1, len(data))).tolist()
            axes.bar(edges[:-1].tolist(), heights, width=(high - low) / N_BINS, align="edge", color=colour)
            axes.axvspan(
                values.mean - values.threshold, values.mean + values.threshold, color="0.5", alpha=0.18, linewidth=0,
                label=f"band: {values.mean:.3g} ± {values.threshold:.3g}",
            )  # fmt: skip
            axes.axvline(values.mean, color="0.25", linewidth=1.0, linestyle="--")
            axes.set_ylabel(f"{name} (% of values)")
            axes.legend(loc="upper right", frameon=False, fontsize=9)
        panels[1].set_xlabel(f"value of the feature ({len(values.before):,} values, {100 * share:.1f} % replaced)")
        figure.suptitle(title, x=0.02, ha="left", fontsize=11)

    save_figure(draw, (7.2, 5.4), png, svg)


def _run(
    model: SparsifiedModel, x: Tensor, batch_size: int, watchers: dict[Site, Callable[[MeanSparse, Tensor], None]]
) -> None:
    with torch.no_grad(), _watched(model, watchers):
        for part in x.split(batch_size):
            model(part)


@contextmanager
def _watched(model: SparsifiedModel, watchers: dict[Site, Callable[[MeanSparse, Tensor], None]]) -> Iterator[None]:
    """Show each watcher the input of its site's operator."""

    def hook(watch: Callable[[MeanSparse, Tensor], None]) -> Callable[[Any, tuple[Any, ...]], None]:
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
