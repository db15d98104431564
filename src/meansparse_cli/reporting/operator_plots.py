"""Pictures of what the operator does: the share of features it blocks at each site, and one channel before and after.

The second is the paper's Figure 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..operator.observe import ChannelValues
from ..sites.find import Site
from .figure import BLUE, ORANGE, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

N_BINS = 101


def draw_blocked(shares: Sequence[float], sites: Sequence[Site], *, title: str, png: Path, svg: Path) -> None:
    """Bars, one a site, in the order of the forward pass."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        places = range(len(sites))
        axes.barh(places, [100 * share for share in shares], color=BLUE, height=0.7)
        for place, share in zip(places, shares, strict=True):
            axes.text(100 * share, place, f" {100 * share:.1f}", va="center", fontsize=8)
        axes.set_yticks(list(places), [f"{site.index}  {site.name}" for site in sites], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("features that the operator replaces (%)")
        axes.margins(x=0.1)

    save_figure(draw, (7.2, max(2.5, 0.26 * len(sites) + 1.2)), png, svg, title=title)


def draw_histogram(values: ChannelValues, *, title: str, png: Path, svg: Path) -> None:
    """The channel's values before and after, one above the other on the same bins, with the band and its centre."""
    low, high = float(values.before.min()), float(values.before.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    share = float((values.before != values.after).double().mean())
    band = (values.mean - values.threshold, values.mean + values.threshold)
    label = f"band: {values.mean:.3g} ± {values.threshold:.3g}"

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(2, 1, sharex=True)
        rows = (("before", values.before, BLUE), ("after", values.after, ORANGE))
        for axes, (name, data, colour) in zip(panels, rows, strict=True):
            counts = torch.histc(data.float(), N_BINS, low, high)
            edges = torch.linspace(low, high, N_BINS + 1)
            heights = (100 * counts / max(1, len(data))).tolist()
            axes.bar(edges[:-1].tolist(), heights, width=(high - low) / N_BINS, align="edge", color=colour)
            axes.axvspan(*band, color="0.5", alpha=0.18, linewidth=0, label=label)
            axes.axvline(values.mean, color="0.25", linewidth=1.0, linestyle="--")
            axes.set_ylabel(f"{name} (% of values)")
            axes.legend(loc="upper right", frameon=False, fontsize=9)
        panels[1].set_xlabel(f"value of the feature ({len(values.before):,} values, {100 * share:.1f} % replaced)")

    save_figure(draw, (7.2, 5.4), png, svg, title=title)
