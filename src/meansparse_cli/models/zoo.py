"""The RobustBench zoo: its entries, their architectures, their files, and which of them a name means."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..data.facts import KNOWN_DATASETS
from ..data.imagenet import ROBUSTBENCH, Preprocessing
from ..errors import CheckpointError, ModelNotFound
from .fitting import Fitted, fit_weights
from .kind import ModelKind
from .libraries import timm_preprocessing
from .names import EMBEDDED, ModelSource, WeightFile, ZooEntry, fetch_command, package_data
from .published_checkpoint import operator_paths, published_architecture, without_operators
from .published_sites import take_out
from .robustbench import quietly, robustbench_tables
from .weights import read_checkpoint, state_dict_of

GOOGLE_DRIVE_URL = "https://drive.google.com/uc?export=download&confirm=t&id="
"""An id of the zoo is put behind it. The same address works in a browser."""


class ZooModel(ModelKind):
    """A name of RobustBench's, or the beginning of just one."""

    kind = "zoo"
    names = ".*"
    entry: ZooEntry

    def __init__(self, source: ModelSource) -> None:
        super().__init__(source)
        self.entry = source.entry
        self.cache_subfolder = Path(source.dataset, source.threat)

    @classmethod
    def resolve(cls, name: str, dataset: str | None, threat: str) -> ModelSource:
        entries = zoo_entries()
        # images in a folder of one's own say nothing about the model's data set
        dataset = dataset if dataset in {e.dataset for e in entries} else cls.dataset
        here = [e for e in entries if (e.dataset, e.threat) == (dataset, threat)]
        found = _matching(name, here)
        if len(found) == 1:
            return super().resolve(found[0].name, dataset, threat)
        where = f"RobustBench's {dataset} models for {threat}"
        if found:
            listed = ", ".join(e.name for e in found)
            raise ModelNotFound(
                f"{name!r} can mean {len(found)} of {where}: {listed}", hint=f"choose one: --model {found[0].name}"
            )
        if elsewhere := _matching(name, entries):
            options = "\n".join(f"  --model {e.name} --dataset {e.dataset} --threat {e.threat}" for e in elsewhere[:8])
            raise ModelNotFound(f"no {name!r} among {where}", hint=f"the zoo has it elsewhere:\n{options}")
        raise ModelNotFound(
            f"no model is called {name!r}",
            hint=f"{_nearest(name, [e.name for e in here] + list(EMBEDDED))}; every name: meansparse models",
        )

    def weights(self) -> tuple[WeightFile, ...]:
        return zoo_source(self.entry)

    def build(self, *, published_sites: bool = False, settings: dict[str, Any] | None = None) -> nn.Module:
        architecture = published_architecture(self.entry) if published_sites else None
        return take_out(build_zoo_model(architecture or self.entry))

    def _load(self, paths: Sequence[Path], allow_pickle: bool, published_sites: bool) -> nn.Module:
        network = self.build(published_sites=published_sites)
        self.fitted = load_zoo_weights(network, self.entry, paths, allow_pickle=allow_pickle, key=self.weights_key)
        return network

    def _load_own(self) -> nn.Module:
        command = fetch_command(self.source)
        raise CheckpointError(f"no weights given for {self.source.name}", hint=f"download them with: {command}")

    def _own_preprocessing(self) -> Preprocessing:
        if (timm_name := _timm_name(self.entry)) is not None:
            return timm_preprocessing(timm_name)
        return ROBUSTBENCH[str(_row(self.entry).get("preprocessing"))]


def _folded(name: str) -> str:
    return name.lower().replace("-", "_")


def _matching(name: str, entries: list[ZooEntry]) -> list[ZooEntry]:
    """The entries a name can mean: the one that is called so, or all that begin so."""
    wanted = _folded(package_data("zoo.yaml")["headline"].get(name.lower(), name))
    exact = [e for e in entries if _folded(e.name) == wanted]
    return exact or [e for e in entries if wanted and _folded(e.name).startswith(wanted)]


def _nearest(name: str, known: list[str]) -> str:
    """The most similar names; a paper's name is compared with what stands before the architecture."""
    by_spelling = {_folded(k).split("_")[0]: k for k in reversed(known)} | {_folded(k): k for k in known}
    if name.endswith(".py"):
        return f"a network of your own is named with what builds it: --model {name}:FACTORY"
    close = [by_spelling[s] for s in difflib.get_close_matches(_folded(name), by_spelling, n=5, cutoff=0.55)]
    return f"did you mean {', '.join(dict.fromkeys(close))}" if close else "nothing comes near"


def zoo_entries() -> list[ZooEntry]:
    """Every model of the zoo, in RobustBench's order. Loads robustbench: a few seconds the first time."""
    return list(robustbench_tables())


def zoo_source(entry: ZooEntry) -> tuple[WeightFile, ...]:
    """The files of an entry, in the order ``load_zoo_weights`` takes them; an ensemble has several."""
    drive, file_name, url = _row(entry)["gdrive_id"], f"{entry.name}.pt", None
    if (timm_name := _timm_name(entry)) is not None:
        import timm

        url = str(timm.get_pretrained_cfg(timm_name).url)
    elif _is_torchvision(entry):
        from torchvision.models import ResNet50_Weights

        url = ResNet50_Weights.IMAGENET1K_V1.url
    if url is not None:
        # PyTorch's file names end in the first eight digits of their sha256, as resnet50-0676ba61.pth
        digest = re.search(r"-([0-9a-f]{8})\.[^/]*$", url)
        return (WeightFile(file_name, url, sha256=digest and digest[1]),)
    if isinstance(drive, str):
        return (WeightFile(file_name, f"{GOOGLE_DRIVE_URL}{drive}"),)
    return tuple(WeightFile(f"{file_name}_m{i}.pt", f"{GOOGLE_DRIVE_URL}{part}") for i, part in enumerate(drive))


def build_zoo_model(entry: ZooEntry) -> nn.Module:
    """The architecture with random weights, in eval mode; nothing is downloaded."""
    if _is_torchvision(entry):
        # its own builder downloads at once; this entry is the same network, ResNet-50 behind a normalisation
        entry = ZooEntry("Salman2020Do_R50", "imagenet", "Linf")
    # one architecture (BiT) calls .cuda() as it is built; its forward pass moves the tensor where it is needed
    with quietly(), mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
        if (timm_name := _timm_name(entry)) is not None:
            import timm

            n_classes = KNOWN_DATASETS[entry.dataset].n_classes
            model = timm.create_model(timm_name, num_classes=n_classes, pretrained=False)
        else:
            model = _row(entry)["model"]()
    return model.eval()  # type: ignore[no-any-return]


def load_zoo_weights(
    model: nn.Module, entry: ZooEntry, paths: Sequence[Path], *, allow_pickle: bool = False, key: str | None = None
) -> Fitted | None:
    """Fill ``build_zoo_model(entry)`` from the files of ``zoo_source(entry)``, in that order, as RobustBench does.

    One file with the whole model's own keys (``model.state_dict()``) is taken for any entry, ensembles included; what
    was found in it is returned. Raises CheckpointError for a file that cannot be read or is of another model.
    """
    mend = f"download the right file with: {fetch_command(entry)}"
    n_files = len(zoo_source(entry))
    for i, path in enumerate(paths):
        checkpoint = read_checkpoint(path, allow_pickle=allow_pickle)
        if n_files == 1 and not operator_paths(model.state_dict()):
            checkpoint = without_operators(checkpoint, entry, path.name)
        if len(paths) == 1 and (n_files == 1 or set(state_dict_of(checkpoint, str(path))) == set(model.state_dict())):
            parts = [(model, checkpoint)]
        elif len(paths) != n_files:
            raise CheckpointError(f"{entry.name} is an ensemble of {n_files} files, {len(paths)} given", hint=mend)
        else:
            parts = _ensemble_parts(model, entry, i, checkpoint)
        for module, weights in parts:
            fitted = fit_weights(module, weights, what=f"{path.name} as {entry.name}", mend=mend, key=key)
    return fitted if len(paths) == 1 else None


def _ensemble_parts(model: Any, entry: ZooEntry, i: int, checkpoint: Any) -> list[tuple[nn.Module, Any]]:
    """Which parts of an ensemble its file ``i`` fills."""
    if entry.name.startswith("Bai2024MixedNUTS"):
        return [(model.std_model if i == 0 else model.rob_model, checkpoint)]
    if not entry.name.startswith("Bai2023Improving"):
        return [(model.models[i], checkpoint)]
    mixed = model.comp_model
    if i < 2:
        return [(mixed.models[i], checkpoint)]
    try:
        return [(mixed.policy_net, checkpoint["model"]), (mixed.bn, checkpoint["bn"])]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{entry.name}: file 3 has no policy network: expected 'model' and 'bn'") from error


def _row(entry: ZooEntry) -> dict[str, Any]:
    try:
        return robustbench_tables()[entry]
    except KeyError:
        raise ModelNotFound(f"RobustBench has no {entry.name} for {entry.dataset}, {entry.threat}") from None


def _timm_name(entry: ZooEntry) -> str | None:
    """The name under which RobustBench registers an entry with timm, if it does: such an entry has no Drive file."""
    robustbench_tables()
    import timm

    name = _folded(f"{entry.name}_{entry.dataset}_{entry.threat}")
    return name if timm.is_model(name) else None


def _is_torchvision(entry: ZooEntry) -> bool:
    return entry.dataset == "imagenet" and entry.name == "Standard_R50"
