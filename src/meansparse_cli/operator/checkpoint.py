"""The two safetensors files of a run: statistics per site, and the same with a chosen alpha.

Tensors ``<index>.mean`` and ``<index>.std`` (channels,), float64, as calibrated, ``<index>.weight`` of learned
thresholds; the header holds the sites, the counts, the estimator and, in ``meansparse.safetensors``, alpha and how
it is applied: centre, spread, shape, a weight for each site. The base model's weights stay where they are: the run's
``fetch.yaml`` names them.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import ArtifactError, ConfigError
from ..files import save_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..sites.find import Site
    from .insertion import SparsifiedModel
    from .statistics import ChannelStatistics


Centre = Literal["channel-mean", "zero", "global-mean"]
Spread = Literal["channel-std", "site-std"]
Shape = Literal["hard", "soft", "garrote", "firm", "half", "smooth", "edge", "widen"]


@dataclass(frozen=True)
class Checkpoint:
    """Sites, their statistics in the same order, and alpha (None before the sweep).

    ``site_weights`` (None: 1 everywhere): the alpha of a site is ``alpha`` times its weight, in [0, 1]; a site of
    weight 0 gets no operator. ``centre``: what a feature is replaced by and measured from, its channel's mean, zero, or
    the mean over all channels of the site (paper, Table 8). ``spread``: the threshold is alpha times the std of the
    channel, or of the whole site, around their own means. ``shape``: the rule within it (``shapes.SHAPES``).
    ``channel_weights``: (channels,) float64 in [0, 1] a site, which multiply the alpha of each channel further.
    """

    sites: "tuple[Site, ...]"
    statistics: "tuple[ChannelStatistics, ...]"
    estimator: str
    alpha: float | None = None
    rule: str = "all"
    """The site rule that chose the sites."""
    site_weights: tuple[float, ...] | None = None
    centre: Centre = "channel-mean"
    spread: Spread = "channel-std"
    shape: Shape = "hard"
    channel_weights: "tuple[Tensor, ...] | None" = None

    def __post_init__(self) -> None:
        weights = self.site_weights
        if weights is not None and (
            len(weights) != len(self.sites) or not all(0 <= w <= 1 for w in weights) or not any(weights)
        ):
            raise ConfigError(
                f"site weights {weights} for {len(self.sites)} sites; expected one a site, in [0, 1], not all 0"
            )
        for name, known in (("centre", Centre), ("spread", Spread), ("shape", Shape)):
            if getattr(self, name) not in get_args(known):
                raise ConfigError(f"{name} {getattr(self, name)!r}", hint=f"{name}: {', '.join(get_args(known))}")
        if self.channel_weights is not None:
            for site, weight in zip(self.sites, self.channel_weights, strict=True):
                if weight.shape != (site.channels,) or not ((weight >= 0) & (weight <= 1)).all():
                    raise ConfigError(
                        f"{site.name}: weights of {tuple(weight.shape)}; expected one a channel, in [0, 1]"
                    )

    @property
    def weights(self) -> tuple[float, ...]:
        """``site_weights``, written out."""
        return self.site_weights or (1.0,) * len(self.sites)

    @property
    def active(self) -> "tuple[Site, ...]":
        """The sites that get an operator."""
        return tuple(site for site, weight in zip(self.sites, self.weights, strict=True) if weight > 0)

    def site_alphas(self, alpha: float) -> dict[str, float]:
        """The alpha of each site, by name, where the shared one is ``alpha``."""
        return {site.name: alpha * weight for site, weight in zip(self.sites, self.weights, strict=True)}

    def in_words(self, alpha: float) -> str:
        """``alpha 0.3``, and what is not as in the paper: sites left out, an alpha for each, the centre, the spread."""
        values = {value for value in self.site_alphas(alpha).values() if value > 0}
        words = f"alphas {min(values):g} to {max(values):g}" if len(values) > 1 else f"alpha {alpha:g}"
        if len(self.active) < len(self.sites):
            words += f" at {len(self.active)} of {len(self.sites)} sites"
        if self.channel_weights is not None:
            words += ", learned for each channel"
        options = {"centre": "channel-mean", "spread": "channel-std", "shape": "hard"}
        return words + "".join(
            f", {name} {getattr(self, name)}" for name, default in options.items() if getattr(self, name) != default
        )

    def applied(self, model: "nn.Module", alpha: float) -> "SparsifiedModel":
        """``sparsify`` at ``alpha``."""
        return sparsify(model, self, alpha=alpha)

    def options_id(self) -> str:
        """The options that tell this checkpoint from one with the same statistics; empty where none does."""
        options: tuple[Any, ...] = (self.site_weights, self.centre, self.spread)
        if self.shape != "hard":
            options += (self.shape,)
        if self.channel_weights is not None:
            options += (hashlib.sha256(b"".join(w.numpy().tobytes() for w in self.channel_weights)).hexdigest(),)
        return "" if options == (None, "channel-mean", "channel-std") else repr(options)


def save_checkpoint(
    path: Path, checkpoint: Checkpoint, *, tensors: dict[str, Any] | None = None, header: dict[str, Any] | None = None
) -> None:
    """Write ``checkpoint`` atomically, with more tensors and entries of the header where an export has some."""
    tensors = dict(tensors or {})
    for i, s in enumerate(checkpoint.statistics):
        tensors |= {f"{i:04d}.mean": s.mean.contiguous(), f"{i:04d}.std": s.std.contiguous()}
    for i, weight in enumerate(checkpoint.channel_weights or ()):
        tensors[f"{i:04d}.weight"] = weight.contiguous()
    header = (header or {}) | {
        "sites": [asdict(site) for site in checkpoint.sites],
        "counts": [s.count for s in checkpoint.statistics],
        "estimator": checkpoint.estimator,
        "alpha": checkpoint.alpha,
        "rule": checkpoint.rule,
    }
    # only where they say something, so that a plain checkpoint stays what it was, byte for byte
    if checkpoint.site_weights is not None:
        header["site_weights"] = list(checkpoint.site_weights)
    if (checkpoint.centre, checkpoint.spread) != ("channel-mean", "channel-std"):
        header |= {"centre": checkpoint.centre, "spread": checkpoint.spread}
    if checkpoint.shape != "hard":
        header["shape"] = checkpoint.shape
    if checkpoint.channel_weights is not None:
        header["has_channel_weights"] = True
    save_tensors(path, tensors, {"meansparse": json.dumps(header)})


def load_checkpoint(path: Path, *, mend: str = "run `meansparse calibrate` again") -> Checkpoint:
    """Read what ``save_checkpoint`` wrote; ArtifactError if it is anything else."""
    from pydantic import TypeAdapter
    from safetensors import SafetensorError, safe_open

    from ..sites.find import Site
    from .module import check_alpha
    from .statistics import ChannelStatistics

    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["meansparse"])
            sites = TypeAdapter(tuple[Site, ...]).validate_python(header["sites"])
            statistics = tuple(
                ChannelStatistics(count, file.get_tensor(f"{i:04d}.mean"), file.get_tensor(f"{i:04d}.std"))
                for i, count in enumerate(header["counts"])
            )
            if header["alpha"] is not None:
                check_alpha(header["alpha"])
            for site, statistic in zip(sites, statistics, strict=True):
                _check_fit(site, statistic)
            weights, keys = header.get("site_weights"), [f"{i:04d}.weight" for i in range(len(sites))]
            return Checkpoint(
                sites,
                statistics,
                header["estimator"],
                header["alpha"],
                header.get("rule", "all"),
                site_weights=None if weights is None else tuple(weights),
                centre=header.get("centre", "channel-mean"),
                spread=header.get("spread", "channel-std"),
                shape=header.get("shape", "hard"),
                channel_weights=tuple(map(file.get_tensor, keys)) if header.get("has_channel_weights") else None,
            )
    except (ConfigError, SafetensorError, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ArtifactError(f"{path} is not a MeanSparse checkpoint: {error}", hint=mend) from error


def _check_fit(site: "Site", statistics: "ChannelStatistics") -> None:
    """Raise ValueError for numbers that no calibration of ``site`` can give."""
    axis, mean, std = site.channel_axis, statistics.mean, statistics.std
    if not 1 <= axis <= len(site.shape) or site.shape[axis - 1] != site.channels:
        raise ValueError(f"{site.name}: {site.channels} channels on axis {axis} of (batch, *{site.shape})")
    if type(statistics.count) is not int or statistics.count < 0:
        raise ValueError(f"{site.name}: a count of {statistics.count!r}")
    for what, values in (("mean", mean), ("std", std)):
        if values.shape != (site.channels,) or not values.is_floating_point():
            found = f"{tuple(values.shape)}, {values.dtype}"
            raise ValueError(f"{site.name}: {what} is of shape {found}; expected floats of shape ({site.channels},)")
        if not values.isfinite().all() or (what == "std" and (values < 0).any()):
            raise ValueError(f"{site.name}: a {what} that is {'negative or ' if what == 'std' else ''}not finite")


def sparsify(model: "nn.Module", checkpoint: Checkpoint, *, alpha: float | None = None) -> "SparsifiedModel":
    """Put the operators of ``checkpoint`` into ``model``, in place, and return the wrapper in eval mode.

    ``alpha`` overrides the checkpoint's own (0 where it has none); the weights of the sites go on multiplying it.
    """
    from .device import device_of
    from .insertion import insert
    from .module import MeanSparse

    value = alpha if alpha is not None else checkpoint.alpha or 0.0
    weights, device = checkpoint.weights, device_of(model)
    of_channels: Sequence[Any] = checkpoint.channel_weights or (1.0,) * len(weights)
    modules: Sequence[Any] = [
        MeanSparse(
            *centred(statistic, checkpoint.centre, checkpoint.spread),
            value,
            site.channel_axis,
            weight=weight * of_channel,
            shape=checkpoint.shape,
        ).to(device)
        for site, statistic, weight, of_channel in zip(
            checkpoint.sites, checkpoint.statistics, weights, of_channels, strict=True
        )
        if weight > 0
    ]
    return insert(model, checkpoint.active, modules).eval()


def centred(
    statistics: "ChannelStatistics",
    centre: Centre = "channel-mean",
    spread: Spread = "channel-std",
) -> "tuple[Tensor, Tensor]":
    """Mean and std (channels,) of the operator of one site, from the statistics that calibrate wrote.

    Every channel took as many values as the others, so the site's mean is the mean of the channels' means, and its
    variance that of the means plus the mean of the variances.
    """
    import torch

    mean, std = statistics.mean, statistics.std
    if spread == "site-std":
        std = (std.square().mean() + mean.var(correction=0)).sqrt().expand_as(std)
    if centre == "zero":
        mean = torch.zeros_like(mean)
    elif centre == "global-mean":
        mean = mean.mean().expand_as(mean)
    return mean, std
