"""The authors' own checkpoints (``*_WS.pt``, RobustBench's ``Amini2024MeanSparse_*``): a base's weights and operators.

Each operator is five buffers or seven: ``running_mean`` and ``running_var`` (channels,), ``threshold`` (their name for
alpha), and some that are of no use afterwards. What is left are the base's tensors under the base's own names.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.facts import KNOWN_DATASETS
from ..errors import CheckpointError
from ..operator.statistics import ChannelStatistics
from .names import ZooEntry, fetch_command, package_data
from .weights import read_checkpoint, state_dict_of

NEEDED_BUFFERS = ("running_mean", "running_var", "threshold")
OTHER_BUFFERS = ("flag_update_statistics", "batch_num", "momentum", "epsilon")


@dataclass(frozen=True)
class PublishedFile:
    """One of the authors' models, as ``zoo.yaml`` has it; several files share a name."""

    name: str
    dataset: str
    threat: str
    base: str
    entry: str | None
    n_sites: int
    pattern: str
    alpha: float

    @property
    def file_name(self) -> str:
        return f"{self.base}_WS.pt"

    @property
    def n_classes(self) -> int:
        return KNOWN_DATASETS[self.dataset].n_classes

    @property
    def model(self) -> ZooEntry:
        """The entry of the zoo whose architecture takes the whole file, or else its base."""
        return ZooEntry(self.entry or self.base, self.dataset, self.threat)

    def is_for(self, entry: ZooEntry) -> bool:
        """Whether the file can be loaded as this entry of the zoo: RobustBench's for it, or its base."""
        return (entry.dataset, entry.threat) == (self.dataset, self.threat) and entry.name in (self.base, self.entry)


PUBLISHED_FILES = tuple(PublishedFile(**row) for row in package_data("zoo.yaml")["published"])


@dataclass(frozen=True)
class PublishedCheckpoint:
    """``base``: the base's tensors by name. ``statistics``: by the operator's path, wrappers' prefixes taken off.

    ``alphas``: likewise; ``alpha`` is the one they share, None where they differ or were never set. ``file``: None
    where it is none of the authors'.
    """

    base: dict[str, Tensor]
    statistics: dict[str, ChannelStatistics]
    alphas: dict[str, float]
    file: PublishedFile | None

    @property
    def alpha(self) -> float | None:
        different = set(self.alphas.values())
        return different.pop() if len(different) == 1 and different != {0.0} else None

    def path_of(self, site_path: str) -> str | None:
        """Under which path the file has the operator of a site: the first scheme put it beside the activation."""
        bare = bare_path(site_path)
        return next((path for path in (bare, f"{bare}.0") if path in self.statistics), None)


def published_architecture(entry: ZooEntry | None) -> ZooEntry | None:
    """The entry of the zoo whose architecture has the authors' operators and takes the weights of ``entry``, if any."""
    return next((file.model for file in published_files_of(entry) if file.entry is not None), None)


def published_files_of(entry: ZooEntry | None) -> list[PublishedFile]:
    """The authors' files for this model, the newer one first; none for a model that is not of the zoo (None)."""
    return [file for file in PUBLISHED_FILES if entry is not None and file.is_for(entry)]


def read_published(path: Path, *, allow_pickle: bool = False) -> PublishedCheckpoint | None:
    """The base and the operators of a checkpoint file, or None if it has no operators."""
    return split_published(read_checkpoint(path, allow_pickle=allow_pickle), what=str(path))


def split_published(checkpoint: Any, *, what: str) -> PublishedCheckpoint | None:
    """Take the operators' buffers off the weights, whose names may have the prefixes of DataParallel and its like."""
    state = state_dict_of(checkpoint, what)
    if not (paths := operator_paths(state)):
        return None
    buffers = {f"{path}.{name}" for path in paths for name in (*NEEDED_BUFFERS, *OTHER_BUFFERS)}
    base = {key: tensor for key, tensor in state.items() if key not in buffers}
    statistics = {bare_path(path): _statistics(state, path, what) for path in paths}
    # the number a person typed: 0.15, not the float32 nearest to it written out
    alphas = {bare_path(p): float(str(state[f"{p}.threshold"].detach().float().cpu().numpy())) for p in paths}
    n_classes = next((len(base[k]) for k in reversed(base) if re.search(r"(logits|fc|head|linear)\.weight$", k)), None)
    is_as_large = [f for f in PUBLISHED_FILES if (f.n_classes, f.n_sites) == (n_classes, len(statistics))]
    file = next((f for f in is_as_large if all(re.fullmatch(f.pattern, path) for path in statistics)), None)
    return PublishedCheckpoint(base, statistics, alphas, file)


def without_operators(checkpoint: Any, entry: ZooEntry, what: str) -> Any:
    """A checkpoint for ``entry`` with the operators taken off; itself if it has none.

    Raises CheckpointError if they are those of another published model, which may differ in nothing but its weights.
    """
    if (held := split_published(checkpoint, what=what)) is None:
        return checkpoint
    if (file := held.file) is not None and not file.is_for(entry):
        raise CheckpointError(
            f"{what} is MeanSparse's {file.name} for {file.dataset}, {file.threat} ({file.n_sites} operators, "
            f"{file.n_classes} classes), not {entry.name} for {entry.dataset}, {entry.threat}",
            hint=f"several files are called {file.file_name}; this one belongs to: "
            f"{fetch_command(file.model)} --from-file FILE",
        )
    return held.base


def bare_path(path: str) -> str:
    """A module path without the prefixes of wrappers: DataParallel, torch.compile, a normalisation."""
    return re.sub(r"^((module|_orig_mod|model)\.)+", "", path)


def operator_paths(state: Iterable[str]) -> list[str]:
    """Where the published operators are in a network whose tensors have these names."""
    keys = set(state)
    ends = f".{NEEDED_BUFFERS[0]}"
    found = [key.removesuffix(ends) for key in keys if key.endswith(ends)]
    return sorted(p for p in found if all(f"{p}.{name}" in keys for name in NEEDED_BUFFERS))


def _statistics(state: Mapping[str, Tensor], path: str, what: str) -> ChannelStatistics:
    mean, variance = state[f"{path}.running_mean"].float(), state[f"{path}.running_var"].float()
    if mean.ndim != 1 or mean.shape != variance.shape or not bool((torch.isfinite(mean) & (variance >= 0)).all()):
        raise CheckpointError(
            f"{what}: the statistics of {path} are no mean and variance of {tuple(mean.shape)} channels"
        )
    n_batches = state.get(f"{path}.batch_num")
    # the root in float32, as the published operator takes it: the threshold is then the same number
    return ChannelStatistics(0 if n_batches is None else int(n_batches), mean.double(), variance.sqrt().double())
