"""The two safetensors files of a run: statistics per site, and the same with a chosen alpha.

Tensors ``<index>.mean`` and ``<index>.std`` (channels,), float64; the header holds the sites, the counts, the estimator
and, in ``meansparse.safetensors``, alpha. The base model's weights stay where they are: the run's ``fetch.yaml`` names them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .artifacts import write_bytes
from .errors import ArtifactError

if TYPE_CHECKING:
    from torch import nn

    from .sites import Site
    from .sparsify import SparsifiedModel
    from .statistics import ChannelStatistics


@dataclass(frozen=True)
class Checkpoint:
    """Sites, their statistics in the same order, and alpha (None before the sweep)."""

    sites: "tuple[Site, ...]"
    statistics: "tuple[ChannelStatistics, ...]"
    estimator: str
    alpha: float | None = None
    rule: str = "all"
    """The site rule that chose the sites."""


def save_checkpoint(
    path: Path, checkpoint: Checkpoint, *, tensors: dict[str, Any] | None = None, header: dict[str, Any] | None = None
) -> None:
    """Write ``checkpoint`` atomically, with more tensors and entries of the header where an export has some."""
    from safetensors.torch import save

    tensors = dict(tensors or {})
    for i, s in enumerate(checkpoint.statistics):
        tensors |= {f"{i:04d}.mean": s.mean.contiguous(), f"{i:04d}.std": s.std.contiguous()}
    header = (header or {}) | {
        "sites": [asdict(site) for site in checkpoint.sites],
        "counts": [s.count for s in checkpoint.statistics],
        "estimator": checkpoint.estimator,
        "alpha": checkpoint.alpha,
        "rule": checkpoint.rule,
    }
    # one key: safetensors writes several in any order, and equal checkpoints are to have equal bytes
    write_bytes(path, save(tensors, {"meansparse": json.dumps(header)}))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read what ``save_checkpoint`` wrote; ArtifactError if it is anything else."""
    from safetensors import SafetensorError, safe_open

    from .sites import Site
    from .statistics import ChannelStatistics

    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["meansparse"])
            names = {field.name for field in fields(Site)}
            rows = [{k: v for k, v in row.items() if k in names} for row in header["sites"]]
            sites = tuple(Site(**row | {"shape": tuple(row["shape"])}) for row in rows)
            statistics = tuple(
                ChannelStatistics(count, file.get_tensor(f"{i:04d}.mean"), file.get_tensor(f"{i:04d}.std"))
                for i, count in enumerate(header["counts"])
            )
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ArtifactError(
            f"{path} is not a MeanSparse checkpoint: {error}", hint="run `meansparse calibrate` again"
        ) from error
    return Checkpoint(sites, statistics, header["estimator"], header["alpha"], header.get("rule", "all"))


def sparsify(model: "nn.Module", checkpoint: Checkpoint, *, alpha: float | None = None) -> "SparsifiedModel":
    """Put the operators of ``checkpoint`` into ``model``, in place, and return the wrapper in eval mode.

    ``alpha`` overrides the checkpoint's own (0 where it has none).
    """
    from .sparsify import MeanSparse, insert

    value = alpha if alpha is not None else checkpoint.alpha or 0.0
    device = next(iter(model.parameters())).device
    modules: Sequence[Any] = [
        MeanSparse(statistic.mean, statistic.std, value, site.channel_axis).to(device)
        for site, statistic in zip(checkpoint.sites, checkpoint.statistics, strict=True)
    ]
    return insert(model, checkpoint.sites, modules).eval()
