"""The RobustBench zoo: its entries, their architectures, their checkpoints. The only file that imports robustbench.

RobustBench 1.1.1 does not import as installed: it asks for ``autoattack`` while its dependency installs
``pyautoattack``, and for ``pkg_resources``, which setuptools dropped in version 81. ``_import_robustbench`` lends it
both for the length of the import. Downloading is left to ``fetch.py``; here a file is only read, never run.
"""

import argparse
import contextlib
import importlib
import importlib.util
import pickle
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from .data import KNOWN_DATASETS
from .download import looks_like_html
from .errors import CheckpointError, ConfigError, ModelNotFound
from .published_checkpoint import has_operators, without_operators

ALLOW_PICKLE_HINT = "if you trust where the file comes from, let it run its code: the same command with --allow-pickle"

CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "last")
"""Where a checkpoint keeps its weights, in the order they are looked for."""

CONSTANTS = ("mu", "sigma", "mean", "std", "normalize.mean", "normalize.std")
"""Normalisation buffers the architecture sets by itself; older checkpoints lack them."""

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
    dataset_option = "" if dataset == "cifar10" else f" --dataset {dataset}"
    threat_option = "" if threat == "Linf" else f" --threat {threat}"
    return f"meansparse fetch --model {name}{dataset_option}{threat_option}"


def read_checkpoint(path: Path, *, allow_pickle: bool = False) -> Any:
    """What a ``.pt`` or ``.safetensors`` file holds, on the CPU; no code in it is run unless ``allow_pickle``.

    Raises CheckpointError for a file that is missing, empty, a web page, cut short, or needs more than tensors.
    """
    again = f"delete {path} and fetch it again"
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}", hint="name a file, or download one: meansparse fetch")
    with open(path, "rb") as handle:
        head = handle.read(512)
    if not head:
        raise CheckpointError(f"{path} is empty", hint=again)
    if looks_like_html(head):
        raise CheckpointError(f"{path} is a web page, not a checkpoint", hint=again)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}", hint=again) from error
    is_zip = zipfile.is_zipfile(path)
    if head.startswith(b"PK") and not is_zip:
        raise CheckpointError(f"{path} ends too early: {path.stat().st_size:,} bytes of a longer file", hint=again)
    try:
        with torch.serialization.safe_globals(_harmless_types()):
            # mapped, not read: the weights are copied into the model straight from the file
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=is_zip or None)
    except pickle.UnpicklingError as error:
        if not allow_pickle and _needs_code(str(error), is_pickle=is_zip or head.startswith(b"\x80")):
            reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
            raise CheckpointError(f"{path} holds more than tensors: {reason}", hint=ALLOW_PICKLE_HINT) from error
        raise CheckpointError(f"{path} is not a checkpoint: {_first_line(error)}", hint=again) from error
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{path} holds Python objects whose code is not installed: {error}",
            hint="save the weights alone: torch.save(model.state_dict(), FILE)",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {_first_line(error)}", hint=again) from error


def fit_weights(
    module: nn.Module, checkpoint: Any, *, what: str, lenient: bool = False, mend: str | None = None
) -> None:
    """Copy a checkpoint into ``module``: every tensor the module has must be there, in its shape.

    Wrapper prefixes (``module.``, ``model.``) are taken off or put on until the keys fit. With ``lenient``, more keys
    than the module has are let pass, unless they belong to further layers of the same network. Raises CheckpointError
    and leaves the module as it was if nothing fits.
    """
    state = state_dict_of(checkpoint, what)
    wanted = module.state_dict()
    closest: tuple[int, str] | None = None
    for candidate in _spellings(state, module):
        n_problems, problems = _compare(candidate, wanted, lenient=lenient)
        if not n_problems:
            module.load_state_dict({key: candidate[key] for key in wanted if key in candidate}, strict=False)
            return
        if closest is None or n_problems < closest[0]:
            closest = n_problems, problems
    assert closest is not None  # _spellings yields at least the keys as they are
    raise CheckpointError(f"{what}: the weights are of another model: {closest[1]}", hint=mend)


def state_dict_of(checkpoint: Any, what: str) -> Mapping[str, Tensor]:
    """The tensors by key, out of whichever container the checkpoint keeps them in."""
    if isinstance(checkpoint, nn.Module):
        return checkpoint.state_dict()
    if isinstance(checkpoint, Mapping):
        for container in CONTAINERS:
            if isinstance(inner := checkpoint.get(container), (Mapping, nn.Module)):
                return state_dict_of(inner, what)
        if tensors := {str(k): v for k, v in checkpoint.items() if isinstance(v, Tensor)}:
            return tensors
        found = f"a dictionary of {', '.join(map(str, list(checkpoint)[:6])) or 'nothing'}"
    else:
        found = type(checkpoint).__name__
    raise CheckpointError(
        f"{what}: no weights found, but {found}", hint=f"expected tensors by name, or one of {CONTAINERS}"
    )


def _compare(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, lenient: bool) -> tuple[int, str]:
    """How many tensors stand in the way, and a sentence that names the first few."""
    missing = [k for k in wanted if k not in state and not _may_be_missing(k)]
    unexpected = [k for k in state if k not in wanted]
    if lenient:
        parents = {k[:i] for k in wanted for i, letter in enumerate(k) if letter == "."}
        unexpected = [k for k in unexpected if _is_further_layer(k, parents)]
    reshaped = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    sentences = []
    if missing:
        sentences.append(f"{len(missing)} of {len(wanted)} tensors missing ({_first(missing)})")
    if unexpected:
        sentences.append(f"{len(unexpected)} unexpected ({_first(unexpected)})")
    if reshaped:
        shapes = [f"{k} {tuple(state[k].shape)}, expected {tuple(wanted[k].shape)}" for k in reshaped]
        sentences.append(f"{len(reshaped)} of another shape ({_first(shapes)})")
    return len(missing) + len(unexpected) + len(reshaped), "; ".join(sentences)


def _may_be_missing(key: str) -> bool:
    return key in CONSTANTS or key.endswith(".num_batches_tracked")


def _is_further_layer(key: str, parents: set[str]) -> bool:
    """Whether ``key`` continues a numbered list of the model, as ``layer.9.conv`` does after ``layer.8``."""
    parts = key.split(".")
    for i, part in enumerate(parts[:-1]):
        prefix = ".".join(parts[:i])
        siblings = f"{prefix}.0" if prefix else "0"
        if part.isdigit() and siblings in parents and ".".join(parts[: i + 1]) not in parents:
            return True
    return False


def _first(names: list[str], n: int = 3) -> str:
    return ", ".join(names[:n]) + (", ..." if len(names) > n else "")


def _needs_code(refusal: str, *, is_pickle: bool) -> bool:
    """Whether torch refused a file for what it would run, and not because it is no pickle at all."""
    names_a_type = any(word in refusal for word in ("GLOBAL", "unsupported class", "Unsupported class", "is blocked"))
    return names_a_type or (is_pickle and "Unsupported operand" in refusal)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _without(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items()}


def _spellings(state: Mapping[str, Tensor], module: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """The same tensors under the names wrappers give them: as they are, unwrapped, and behind a normalisation."""
    bare = _without(_without(state, "module."), "_orig_mod.")
    inner = _without(bare, "model.")
    yield from (state, bare, inner, {f"model.{k}": v for k, v in inner.items()})
    target = getattr(module, "model", module)
    # timm renamed layers over the years, and each architecture's file knows how its old checkpoints read
    convert = getattr(sys.modules.get(type(target).__module__), "checkpoint_filter_fn", None)
    if convert is not None:
        with contextlib.suppress(KeyError, AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            converted = convert(dict(inner), target)
            yield converted if target is module else {f"model.{k}": v for k, v in converted.items()}


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


def _harmless_types() -> list[Any]:
    """Types often saved beside weights (arguments, scores) that hold values and run nothing."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    numbers = [type(np.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "bool")]
    return [argparse.Namespace, np.dtype, *numbers, scalar, (scalar, "numpy.core.multiarray.scalar")]


@cache
def _tables() -> dict[ZooEntry, dict[str, Any]]:
    tables = _import_robustbench().model_dicts
    return {
        ZooEntry(name, dataset.value, threat.value): row
        for dataset, threats in tables.items()
        for threat, rows in threats.items()
        for name, row in rows.items()
    }


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
    """Other people's warnings are not our user's business, and stdout carries our results only."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
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
