"""The RobustBench zoo: its entries, their architectures, their files. The only file that imports robustbench.

RobustBench 1.1.1 does not import as installed: it asks for ``autoattack`` while its dependency installs
``pyautoattack``, and for ``pkg_resources``, which setuptools dropped in version 81. ``_import_robustbench`` lends it
both for the length of the import. Downloading is left to ``fetch.py``, reading a checkpoint to ``weights_file.py``.
"""

import contextlib
import importlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import nn

from ..data.datasets import KNOWN_DATASETS
from ..errors import CheckpointError, ConfigError, ModelNotFound
from .published_checkpoint import has_operators, without_operators
from .weights_file import fit_weights, read_checkpoint, state_dict_of

LENIENT = (
    "Andriushchenko2020Understanding",
    "Augustin2020Adversarial",
    "Engstrom2019Robustness",
    "Pang2020Boosting",
    "Rice2020Overfitting",
    "Rony2019Decoupling",
    "Wong2020Fast",
    "Hendrycks2020AugMix",
    "Kireev2021Effectiveness",
    "Chen2020Efficient",
    "Wu2020Adversarial",
    "Diffenderfer2021Winning",
    "Huang2022Revisiting_WRN-A4",
    "Bai2024MixedNUTS",
)
"""Entries whose published file holds more than the model; RobustBench loads them, and all of ImageNet, not strictly."""


@dataclass(frozen=True)
class ZooEntry:
    """One model of the zoo, by the three words RobustBench uses: the same name can stand in several tables."""

    name: str
    dataset: str
    threat: str


@dataclass(frozen=True)
class WeightFile:
    """One file to download: on Google Drive (``drive_id``) or at ``url``; ``sha256`` may be a prefix of the digest."""

    file_name: str
    drive_id: str | None = None
    url: str | None = None
    sha256: str | None = None


def zoo_entries() -> list[ZooEntry]:
    """Every model of the zoo, in RobustBench's order. Loads robustbench: a few seconds the first time."""
    return list(_tables())


def zoo_source(entry: ZooEntry) -> tuple[WeightFile, ...]:
    """The files of an entry, in the order ``load_zoo_weights`` takes them; an ensemble has several."""
    drive = _row(entry)["gdrive_id"]
    file_name = f"{entry.name}.pt"
    if (timm_name := _timm_name(entry)) is not None:
        import timm

        return (_web_file(file_name, str(timm.get_pretrained_cfg(timm_name).url)),)
    if _is_torchvision(entry):
        from torchvision.models import ResNet50_Weights

        return (_web_file(file_name, ResNet50_Weights.IMAGENET1K_V1.url),)
    if isinstance(drive, str):
        return (WeightFile(file_name, drive_id=drive),)
    return tuple(WeightFile(f"{file_name}_m{i}.pt", drive_id=part) for i, part in enumerate(drive))


def build_zoo_model(entry: ZooEntry) -> nn.Module:
    """The architecture with random weights, in eval mode; nothing is downloaded."""
    # one architecture (BiT) calls .cuda() as it is built; its forward pass moves the tensor where it is needed
    with _quietly(), mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor):
        if (timm_name := _timm_name(entry)) is not None:
            import timm

            n_classes = KNOWN_DATASETS[entry.dataset].n_classes
            model = timm.create_model(timm_name, num_classes=n_classes, pretrained=False)
        elif _is_torchvision(entry):
            # its own builder downloads at once; this entry is the same network, ResNet-50 behind a normalisation
            model = _row(ZooEntry("Salman2020Do_R50", "imagenet", "Linf"))["model"]()
        else:
            model = _row(entry)["model"]()
    return model.eval()  # type: ignore[no-any-return]


def load_zoo_weights(
    model: nn.Module, entry: ZooEntry, paths: Sequence[Path], *, allow_pickle: bool = False
) -> nn.Module:
    """Fill ``build_zoo_model(entry)`` from the files of ``zoo_source(entry)``, in that order, as RobustBench does.

    One file with the whole model's own keys (``model.state_dict()``) is taken for any entry, ensembles included.
    Raises CheckpointError when a file cannot be read, needs more than tensors, or is of another model.
    """
    lenient = entry.dataset == "imagenet" or entry.name.startswith(LENIENT)
    mend = f"download the right file with: {fetch_command(entry.name, entry.dataset, entry.threat)}"
    n_files = len(zoo_source(entry))
    for i, path in enumerate(paths):
        checkpoint = read_checkpoint(path, allow_pickle=allow_pickle)
        if n_files == 1 and not has_operators(model.state_dict()):
            checkpoint = without_operators(checkpoint, entry, path.name)
        if len(paths) == 1 and (n_files == 1 or _fits_exactly(model, checkpoint, path)):
            parts = [(model, checkpoint)]
        elif len(paths) != n_files:
            raise CheckpointError(f"{entry.name} is an ensemble of {n_files} files, {len(paths)} given", hint=mend)
        else:
            parts = _ensemble_parts(model, entry, i, checkpoint)
        for module, weights in parts:
            fit_weights(module, weights, what=f"{path.name} as {entry.name}", lenient=lenient, mend=mend)
    return model.eval()


def fetch_command(name: str, dataset: str = "cifar10", threat: str = "Linf") -> str:
    """The command that downloads a model, with only the options it needs."""
    return f"meansparse fetch{model_options(name, dataset, threat)}"


def model_options(name: str, dataset: str = "cifar10", threat: str = "Linf") -> str:
    """`` --model NAME``, with the data set and the threat where the name alone would mean another model."""
    dataset_option = "" if dataset == "cifar10" else f" --dataset {dataset}"
    threat_option = "" if threat == "Linf" else f" --threat {threat}"
    return f" --model {name}{dataset_option}{threat_option}"


def _fits_exactly(model: nn.Module, checkpoint: Any, path: Path) -> bool:
    return set(state_dict_of(checkpoint, str(path))) == set(model.state_dict())


def _ensemble_parts(model: Any, entry: ZooEntry, i: int, checkpoint: Any) -> list[tuple[nn.Module, Any]]:
    """Which parts of an ensemble its file ``i`` fills."""
    if entry.name.startswith("Bai2023Improving"):
        mixed = model.comp_model
        if i < 2:
            return [(mixed.models[i], checkpoint)]
        try:
            return [(mixed.policy_net, checkpoint["model"]), (mixed.bn, checkpoint["bn"])]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{entry.name}: file 3 has no policy network: expected 'model' and 'bn'") from error
    if entry.name.startswith("Bai2024MixedNUTS"):
        return [(model.std_model if i == 0 else model.rob_model, checkpoint)]
    return [(model.models[i], checkpoint)]


def _web_file(file_name: str, url: str) -> WeightFile:
    """PyTorch's file names end in the first eight digits of their sha256, as ``resnet50-0676ba61.pth``."""
    tail = url.rsplit("/", 1)[-1].split(".")[0].rsplit("-", 1)[-1]
    is_digest = len(tail) == 8 and all(c in "0123456789abcdef" for c in tail)
    return WeightFile(file_name, url=url, sha256=tail if is_digest else None)


@cache
def _tables() -> dict[ZooEntry, dict[str, Any]]:
    tables = _import_robustbench().model_dicts
    return {
        ZooEntry(name, dataset.value, threat.value): row
        for dataset, threats in tables.items()
        for threat, rows in threats.items()
        for name, row in rows.items()
    }


def zoo_preprocessing(entry: ZooEntry) -> tuple[str | None, str | None]:
    """RobustBench's name for what an ImageNet model does to a picture, and the name in timm of a model that has its own."""
    return _row(entry).get("preprocessing"), _timm_name(entry)


def _row(entry: ZooEntry) -> dict[str, Any]:
    try:
        return _tables()[entry]
    except KeyError:
        raise ModelNotFound(f"RobustBench has no {entry.name} for {entry.dataset}, {entry.threat}") from None


def _timm_name(entry: ZooEntry) -> str | None:
    """The name under which RobustBench registers an entry with timm, if it does: such an entry has no Drive file."""
    _tables()
    import timm

    name = f"{entry.name}_{entry.dataset}_{entry.threat}".lower().replace("-", "_")
    return name if timm.is_model(name) else None


def _is_torchvision(entry: ZooEntry) -> bool:
    return entry.dataset == "imagenet" and entry.name == "Standard_R50"


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What other people's code prints and warns of is not our user's business."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _import_robustbench() -> ModuleType:
    lent: dict[str, ModuleType] = {}
    try:
        if not _is_installed("autoattack"):
            lent["autoattack"] = importlib.import_module("pyautoattack")
            lent["autoattack.state"] = importlib.import_module("pyautoattack.state")
        if not _is_installed("pkg_resources"):
            lent["pkg_resources"] = _pkg_resources()
        sys.modules.update(lent)
        with _quietly():
            return importlib.import_module("robustbench.model_zoo.models")
    except ImportError as error:
        raise ConfigError(
            f"RobustBench cannot be imported: {error}", hint="install it: python -m pip install robustbench==1.1.1"
        ) from error
    finally:
        for name in lent:  # whoever asks for the real one later must not find ours
            sys.modules.pop(name, None)


def _is_installed(name: str) -> bool:
    return name in sys.modules or importlib.util.find_spec(name) is not None


def _pkg_resources() -> ModuleType:
    """The one function RobustBench uses of it: the path of a file that lies beside a module."""
    module = ModuleType("pkg_resources")

    def resource_filename(name: str, resource: str) -> str:
        return str(Path(str(sys.modules[name].__file__)).parent / resource)

    module.resource_filename = resource_filename  # type: ignore[attr-defined]
    return module
