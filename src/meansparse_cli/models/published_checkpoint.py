"""The authors' own checkpoints (``*_WS.pt``, RobustBench's ``Amini2024MeanSparse_*``): a base's weights and operators.

Each operator is five buffers or seven: ``running_mean`` and ``running_var`` (channels,), ``threshold`` (their name for
alpha), and three or four that are of no use afterwards. The tensors that are left when these are taken off are the base
model's, under the base model's own names. Several files share a name; which model a file is shows in its keys.
"""

from __future__ import annotations

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
from .names import ZooEntry, fetch_command
from .weights import read_checkpoint, state_dict_of

NEEDED_BUFFERS = ("running_mean", "running_var", "threshold")
OTHER_BUFFERS = ("flag_update_statistics", "batch_num", "momentum", "epsilon")

_RESIDUAL = r"layer\.\d+\.block\.\d+\.meansparse_[012]|meansparse_end"
_ACTIVATIONS = r"layer\.\d+\.block\.\d+\.relu_[01]\.0|relu\.0"
_SWIN = r"layers\.\d+\.blocks\.\d+\.(mlp\.)?meansparse[12]"
_CONVNEXT = r"stages\.\d+\.blocks\.\d+\.(mlp\.act\.0|drop_path\.1)"
_IMAGENET_ACTIVATIONS = r"stem\.stem\.stem\.2\.0|stages\..+\.F\.[ab]\.2\.0"


@dataclass(frozen=True)
class PublishedFile:
    """One of the authors' models, on the zoo's ``base``; ``name`` is how messages call it.

    ``variant`` is RobustBench's entry for it, without ``Amini2024MeanSparse_`` (None: it has none). ``n_sites``
    operators at paths that match ``pattern``, and the classes of ``dataset``: together they tell all files apart.
    ``alpha`` is the one their evaluation script sets.
    """

    name: str
    dataset: str
    threat: str
    base: str
    variant: str | None
    n_sites: int
    pattern: str
    alpha: float

    @property
    def file_name(self) -> str:
        return f"{self.base}_WS.pt"

    @property
    def entry(self) -> str | None:
        """RobustBench's name of the sparsified model."""
        return self.variant and f"Amini2024MeanSparse_{self.variant}"

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


_WRN_94, _WRN_70 = "Bartoldson2024Adversarial_WRN-94-16", "Wang2023Better_WRN-70-16"
_SWIN_L, _CONVNEXT_L = "Liu2023Comprehensive_Swin-L", "Liu2023Comprehensive_ConvNeXt-L"
_RA, _RA_1 = "RaWRN-70-16", "RaWRN-70-16, first version"

PUBLISHED_FILES = (
    PublishedFile("WRN-94-16", "cifar10", "Linf", _WRN_94, "S-WRN-94-16", 136, _RESIDUAL, 0.15),
    PublishedFile(_RA, "cifar10", "Linf", "Peng2023Robust", "Ra_WRN_70_16", 214, _RESIDUAL, 0.25),
    PublishedFile(_RA_1, "cifar10", "Linf", "Peng2023Robust", "Ra_WRN_70_16", 143, _ACTIVATIONS, 0.25),
    PublishedFile("WRN-70-16", "cifar10", "Linf", _WRN_70, None, 67, _ACTIVATIONS, 0.20),
    PublishedFile("WRN-70-16", "cifar10", "L2", _WRN_70, "S-WRN-70-16", 100, _RESIDUAL, 0.25),
    PublishedFile("WRN-70-16", "cifar100", "Linf", _WRN_70, "S-WRN-70-16", 100, _RESIDUAL, 0.15),
    PublishedFile("Swin-L", "imagenet", "Linf", _SWIN_L, "Swin-L", 96, _SWIN, 0.10),
    PublishedFile("ConvNeXt-L", "imagenet", "Linf", _CONVNEXT_L, "ConvNeXt-L", 72, _CONVNEXT, 0.30),
    PublishedFile("RaWRN-101-2", "imagenet", "Linf", "Peng2023Robust", None, 75, _IMAGENET_ACTIVATIONS, 0.20),
)
"""Every file the authors published, from their code and RobustBench's; the sites are those really used."""


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
        """The alpha of all operators."""
        different = set(self.alphas.values())
        return different.pop() if len(different) == 1 and different != {0.0} else None

    def path_of(self, site_path: str) -> str | None:
        """Under which path the file has the operator of a site: the first scheme put it beside the activation."""
        bare = bare_path(site_path)
        return next((path for path in (bare, f"{bare}.0") if path in self.statistics), None)


def published_architecture(entry: ZooEntry | None) -> ZooEntry | None:
    """The entry of the zoo whose architecture has the authors' operators and takes the weights of ``entry``.

    An ``Amini2024MeanSparse_*`` entry is its own. None where RobustBench has no such architecture.
    """
    return next((file.model for file in published_files_of(entry) if file.entry is not None), None)


def published_files_of(entry: ZooEntry | None) -> list[PublishedFile]:
    """The authors' files for this model, the newer one first; none for a model that is not of the zoo (None)."""
    return [file for file in PUBLISHED_FILES if entry is not None and file.is_for(entry)]


def has_operators(state: Iterable[str]) -> bool:
    """Whether tensors of these names are a network with published operators."""
    return bool(_operator_paths(state))


def read_published(path: Path, *, allow_pickle: bool = False) -> PublishedCheckpoint | None:
    """The base and the operators of a checkpoint file, or None if it has no operators."""
    state = state_dict_of(read_checkpoint(path, allow_pickle=allow_pickle), str(path))
    return split_published(state, what=str(path)) if has_operators(state) else None


def split_published(state: Mapping[str, Tensor], *, what: str) -> PublishedCheckpoint:
    """Take the operators' buffers off a state dict, which may have the prefixes of DataParallel and other wrappers."""
    paths = _operator_paths(state)
    buffers = {f"{path}.{name}" for path in paths for name in (*NEEDED_BUFFERS, *OTHER_BUFFERS)}
    base = {key: tensor for key, tensor in state.items() if key not in buffers}
    statistics = {bare_path(path): _statistics(state, path, what) for path in paths}
    alphas = {bare_path(path): _shortest(state[f"{path}.threshold"]) for path in paths}
    n_classes = next((len(base[k]) for k in reversed(base) if re.search(r"(logits|fc|head|linear)\.weight$", k)), None)
    file = next((m for m in PUBLISHED_FILES if m.n_classes == n_classes and _has_paths(m, statistics)), None)
    return PublishedCheckpoint(base, statistics, alphas, file)


def without_operators(checkpoint: Any, entry: ZooEntry, what: str) -> Any:
    """A checkpoint for ``entry`` with the operators taken off; itself if it has none.

    Raises CheckpointError if they are those of another published model, which may differ in nothing but its weights.
    """
    state = state_dict_of(checkpoint, what)
    if not has_operators(state):
        return checkpoint
    held = split_published(state, what=what)
    if held.file is not None and not held.file.is_for(entry):
        m = held.file
        command = f"{fetch_command(m.model)} --from-file FILE"
        raise CheckpointError(
            f"{what} is MeanSparse's {m.name} for {m.dataset}, {m.threat} "
            f"({m.n_sites} operators, {m.n_classes} classes), not {entry.name} for {entry.dataset}, {entry.threat}",
            hint=f"several files are called {m.file_name}; this one belongs to: {command}",
        )
    return held.base


def bare_path(path: str) -> str:
    """A module path without the prefixes of wrappers: DataParallel, torch.compile, a normalisation."""
    return re.sub(r"^((module|_orig_mod|model)\.)+", "", path)


def _operator_paths(state: Iterable[str]) -> list[str]:
    keys = set(state)
    ends = f".{NEEDED_BUFFERS[0]}"
    found = [key.removesuffix(ends) for key in keys if key.endswith(ends)]
    return sorted(p for p in found if all(f"{p}.{name}" in keys for name in NEEDED_BUFFERS))


def _has_paths(model: PublishedFile, paths: Iterable[str]) -> bool:
    listed = list(paths)
    return len(listed) == model.n_sites and all(re.fullmatch(model.pattern, path) for path in listed)


def _statistics(state: Mapping[str, Tensor], path: str, what: str) -> ChannelStatistics:
    mean, variance = state[f"{path}.running_mean"].float(), state[f"{path}.running_var"].float()
    if mean.ndim != 1 or mean.shape != variance.shape or not bool((torch.isfinite(mean) & (variance >= 0)).all()):
        raise CheckpointError(
            f"{what}: the statistics of {path} are no mean and variance of {tuple(mean.shape)} channels"
        )
    n_batches = state.get(f"{path}.batch_num")
    # the root in float32, as the published operator takes it: the threshold is then the same number
    return ChannelStatistics(0 if n_batches is None else int(n_batches), mean.double(), variance.sqrt().double())


def _shortest(threshold: Tensor) -> float:
    """The number a person typed: 0.15, not the float32 nearest to it written out."""
    return float(str(threshold.detach().float().cpu().numpy()))


def operator_buffers(template: Mapping[str, Tensor], mean: Tensor, std: Tensor, alpha: float) -> dict[str, Any]:
    """The buffers of one published operator, of the names and types in ``template`` (its own ``state_dict()``)."""
    filled = {name: tensor.clone() for name, tensor in template.items()}
    filled["running_mean"] = mean.to(filled["running_mean"])
    filled["running_var"] = std.square().to(filled["running_var"])
    filled["threshold"].fill_(alpha)
    filled["flag_update_statistics"].zero_()  # it never learns again
    return filled
