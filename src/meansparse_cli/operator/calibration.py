"""``meansparse calibrate``: one pass over the calibration split, channel statistics at every site.

All sites see the features of the base model (no operator is active), so one pass serves them all. What is kept is three
numbers a channel. It is saved from time to time and goes on there after a kill.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from ..data.examples import make_loader
from ..errors import SiteError, StatisticsError
from ..ledger import StateFile
from ..sites.find import Site, untouched, unwrap
from .device import device_of, float32_set_to
from .fitting import in_batches
from .insertion import SparsifiedModel, insert, remove
from .statistics import ChannelStatistics, ChannelSums, Estimator, compute, empty, merge, of_batch, on_cpu

log = logging.getLogger(__name__)

SECONDS_BETWEEN_SAVES = 20.0


class ChannelObserver(nn.Module):
    """Stands at a site and sums up what passes, which is unchanged: ``batch``, of the last batch, joins ``sums`` later.

    A GPU is so waited for once a batch, not at each site.
    """

    def __init__(self, site: Site, estimator: Estimator) -> None:
        super().__init__()
        self.site = site
        self.sums = self.batch = empty(site.channels, estimator)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        try:
            self.batch = of_batch(x, self.site.channel_axis, self.site.channels, self.sums.estimator)
        except StatisticsError as error:
            raise StatisticsError(f"{self.site.name}: {error.message}", hint=error.hint) from error
        return x


class PassState:
    """A pass on disk: its sums, and ``fingerprint``, what they depend on (weights, images, sites, batch size)."""

    def __init__(self, file: Path, fingerprint: dict[str, Any]) -> None:
        self.on_disk = StateFile(file, fingerprint, key_name="fingerprint", on_change="restart", note=log.warning)

    def save(self, observers: Sequence[ChannelObserver], done: int) -> None:
        """Keep the sums of ``done`` images."""
        sums = [{"count": o.sums.count, "mean": o.sums.mean, "spread": o.sums.spread} for o in observers]
        self.on_disk.put({"done": done, "sums": sums})

    def restore(self, observers: Sequence[ChannelObserver]) -> int:
        """Put the saved sums back and return how many images they cover; a state of anything else is begun anew."""
        state = self.on_disk.get()
        if state is None or len(state["sums"]) != len(observers):
            return 0
        for observer, sums in zip(observers, state["sums"], strict=True):
            observer.sums = ChannelSums(sums["count"], sums["mean"], sums["spread"], observer.sums.estimator)
        return int(state["done"])


@contextmanager
def observed(model: nn.Module, sites: Sequence[Site], estimator: Estimator) -> Iterator[SparsifiedModel]:
    """Observers in, no gradient, evaluation mode, full float32 on a GPU too; all undone at the end."""
    with untouched(unwrap(model)):
        wrapper = insert(model, sites, [ChannelObserver(site, estimator) for site in sites])
        wrapper.eval()
        try:
            with torch.no_grad(), float32_set_to("ieee"):
                yield wrapper
        finally:
            remove(wrapper)


def channel_sums(
    model: nn.Module,
    sites: Sequence[Site],
    images: "Subset[tuple[Tensor, int]]",
    *,
    batch_size: int,
    estimator: Estimator = "pooled",
    n_workers: int = 0,
    state: PassState | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[ChannelSums]:
    """The sums of each site over all ``images`` ((channels, height, width) in [0, 1]), in float64.

    With ``state``, a pass that was killed goes on from its last save. Raises StatisticsError on NaN, on a site without
    data, on a channel count that changes.
    """
    device = device_of(model)
    with observed(model, sites, estimator) as wrapper:
        observers = [cast(ChannelObserver, wrapper.at(site)) for site in sites]
        done = 0 if state is None else state.restore(observers)
        rest = Subset(images.dataset, list(images.indices)[done:])
        if on_batch is not None and done:
            on_batch(done)
        saved = time.monotonic()
        for batch in make_loader(rest, batch_size, n_workers) if len(rest) else ():
            x = batch[0].to(device)
            add_batch(wrapper, observers, x)
            done += len(x)
            if on_batch is not None:
                on_batch(len(x))
            if state is not None and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                state.save(observers, done)
                saved = time.monotonic()
        return [observer.sums for observer in observers]


def add_batch(wrapper: SparsifiedModel, observers: Sequence[ChannelObserver], x: Tensor) -> None:
    """Show a batch to an ``observed`` model; its sums join those of the observers.

    Where the memory of a GPU ends, the batch is cut in parts, but for the ``published`` estimator, to which it matters
    what a batch is: ``torch.OutOfMemoryError``.
    """

    def show(rows: slice) -> None:
        for observer in observers:
            observer.calls = 0
        wrapper(x[rows])
        _check_reached_once(observers)
        for observer, sums in zip(observers, on_cpu([observer.batch for observer in observers]), strict=True):
            observer.sums = merge(observer.sums, sums)

    if observers and observers[0].sums.estimator == "published":
        show(slice(None))
    else:
        in_batches(unwrap(wrapper.base), len(x), len(x), show)


def calibrate_channels(
    model: nn.Module, sites: Sequence[Site], images: "Subset[tuple[Tensor, int]]", **options: Any
) -> list[ChannelStatistics]:
    """Statistics of each site over all ``images``; ``options`` as those of ``channel_sums``."""
    return statistics_of(sites, channel_sums(model, sites, images, **options))


def statistics_of(sites: Sequence[Site], sums: Sequence[ChannelSums]) -> list[ChannelStatistics]:
    """What the sums of each site come to; StatisticsError for a site without data, and for NaN."""
    return [compute(of_site, site.name) for site, of_site in zip(sites, sums, strict=True)]


def _check_reached_once(observers: Sequence[ChannelObserver]) -> None:
    for observer in observers:
        if observer.calls != 1:
            raise SiteError(
                f"{observer.site.name} was reached {observer.calls} times in one forward pass, expected once",
                hint="the sites of this model depend on its input: it has no fixed place to put the operator",
            )
