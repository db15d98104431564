"""From a name on the command line to a network in memory.

digits, resnet18-w16               embedded: the weights come with the package
FILE.safetensors                   written by `meansparse train`
Bartoldson2024, wang2023better_w.. RobustBench's zoo: a name, or the beginning of just one
timm:NAME, torchvision:NAME        a model of these libraries, with its standard weights, behind its normalisation
module:factory, file.py:factory    the user's own network
"""

import contextlib
import difflib
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import nn

from ..errors import CheckpointError, ConfigError, ModelNotFound
from . import zoo
from .libraries import check_timm_name, check_torchvision_name, load_timm, load_torchvision
from .networks import ResNet18
from .weights_file import fit_weights, read_checkpoint

Kind = Literal["zoo", "embedded", "timm", "torchvision", "factory"]

EMBEDDED = {"digits": "digits", "resnet18-w16": "cifar10"}
"""Model name to the data set it was trained on."""

HEADLINE = {
    "bartoldson2024": "Bartoldson2024Adversarial_WRN-94-16",
    "bartoldson2024adversarial": "Bartoldson2024Adversarial_WRN-94-16",
}
"""Where a paper has several models and its name alone means the one everybody means."""

THREATS = ("Linf", "L2", "corruptions")


@dataclass(frozen=True)
class ModelSource:
    """A model that is known to exist: ``dataset`` and ``threat`` are what it was trained for, as far as known."""

    name: str
    kind: Kind
    dataset: str
    threat: str

    @property
    def entry(self) -> zoo.ZooEntry:
        """The zoo's key of this model; only for ``kind == "zoo"``."""
        return zoo.ZooEntry(self.name, self.dataset, self.threat)


def resolve_model(name: str, dataset: str | None = None, threat: str = "Linf") -> ModelSource:
    """Find the one model a name means. Raises ModelNotFound with the candidates, or with the nearest names.

    ``dataset`` is a data set's name, a path of images, or None (the model's own; CIFAR-10 in the zoo).
    """
    threat = _known_threat(threat)
    if name in EMBEDDED:
        return ModelSource(name, "embedded", EMBEDDED[name], threat)
    if name.endswith(".safetensors"):
        trained_on = _read_metadata(Path(name)).get("dataset")
        return ModelSource(name, "embedded", trained_on or dataset or "cifar10", threat)
    if name.startswith("timm:"):
        check_timm_name(name)
        return ModelSource(name, "timm", dataset or "imagenet", threat)
    if name.startswith("torchvision:"):
        check_torchvision_name(name)
        return ModelSource(name, "torchvision", dataset or "imagenet", threat)
    if ":" in name:
        return ModelSource(name, "factory", dataset or "cifar10", threat)
    return _resolve_zoo(name, dataset, threat)


def load_model(
    source: ModelSource,
    weights: Path | Sequence[Path] | None = None,
    *,
    allow_pickle: bool = False,
    published_sites: bool = False,
) -> nn.Module:
    """The network, float32, on the CPU, in eval mode.

    ``weights``: a file; for an ensemble its files in order, or the folder that holds them; None for what the model
    comes with (embedded, timm, torchvision) or builds itself (factory). ``published_sites``: in the architecture that has
    a place for each operator of the authors, where RobustBench has one (``adopt.py``); the same logits. Raises CheckpointError for weights that cannot be used,
    DownloadError where timm or torchvision cannot fetch them, ModelNotFound for a factory that is not there.
    """
    paths = weight_paths(source, weights)
    if source.kind == "embedded":
        model: nn.Module = _load_embedded(paths[0] if paths else embedded_weights(source))
    elif source.kind == "zoo":
        if not paths:
            command = zoo.fetch_command(source.name, source.dataset, source.threat)
            raise CheckpointError(f"no weights given for {source.name}", hint=f"download them with: {command}")
        network = build_network(source, published_sites=published_sites)
        model = zoo.load_zoo_weights(network, source.entry, paths, allow_pickle=allow_pickle)
    else:
        load_library = {"timm": load_timm, "torchvision": load_torchvision}.get(source.kind)
        model = load_library(source.name, with_weights=not paths) if load_library else _call_factory(source.name)
        if paths:
            checkpoint = read_checkpoint(paths[0], allow_pickle=allow_pickle)
            fit_weights(model, checkpoint, what=f"{paths[0]} as {source.name}")
    return model.cpu().float().eval()


def build_network(
    source: ModelSource, *, published_sites: bool = False, settings: dict[str, Any] | None = None
) -> nn.Module:
    """The architecture of a model, with random weights; published operators are taken out of it.

    ``settings`` are those of an embedded network (``network_settings``).
    """
    from .adopt import take_out
    from .published_checkpoint import published_architecture

    if source.kind == "embedded":
        return ResNet18(**(settings or {}))
    if source.kind == "timm":
        return load_timm(source.name, with_weights=False)
    if source.kind == "torchvision":
        return load_torchvision(source.name, with_weights=False)
    if source.kind == "factory":
        return _call_factory(source.name)
    architecture = published_architecture(source.entry) if published_sites else None
    return take_out(zoo.build_zoo_model(architecture or source.entry))


def network_settings(source: ModelSource, weights: Sequence[Path]) -> dict[str, Any] | None:
    """How an embedded network is built, from the header of its weights; None for every other kind."""
    if source.kind != "embedded":
        return None
    path = weights[0] if weights else embedded_weights(source)
    return json.loads(_read_metadata(path)["network"])  # type: ignore[no-any-return]


def weight_paths(source: ModelSource, weights: Path | Sequence[Path] | None) -> tuple[Path, ...]:
    """The files of weights one by one: a folder gives those an ensemble names, or else all it holds, sorted."""
    if weights is None:
        return ()
    if not isinstance(weights, Path):
        return tuple(weights)
    names = [f.file_name for f in zoo.zoo_source(source.entry)] if source.kind == "zoo" else []
    if len(names) > 1 and weights.name == names[0]:  # an ensemble goes by its first file
        return tuple(weights.with_name(name) for name in names)
    if not weights.is_dir():
        return (weights,)
    if names and all((weights / name).is_file() for name in names):
        return tuple(weights / name for name in names)
    found = tuple(sorted(p for p in weights.iterdir() if p.suffix in (".pt", ".pth", ".tar", ".safetensors")))
    if len(found) != max(1, len(names)):
        raise CheckpointError(
            f"{weights} holds {len(found)} checkpoints, {source.name} has {max(1, len(names))}",
            hint="name the file itself" if len(names) < 2 else f"expected {', '.join(names)}",
        )
    return found


def embedded_weights(source: ModelSource) -> Path:
    """The file of an embedded model. Raises CheckpointError if the installation lacks it."""
    if source.name.endswith(".safetensors"):
        return Path(source.name)
    path = Path(str(resources.files(__package__) / "weights" / f"{source.name}.safetensors"))
    if not path.is_file():
        raise CheckpointError(
            f"this installation has no weights for {source.name} (expected {path})",
            hint="install the package again, or train the model: meansparse train --help",
        )
    return path


def _known_threat(threat: str) -> str:
    wanted = threat.lower().removesuffix("_3d")
    for known in THREATS:
        if known.lower() == wanted:
            return known
    raise ConfigError(f"no threat model {threat!r}", hint=f"expected one of {', '.join(THREATS)}")


def _folded(name: str) -> str:
    return name.lower().replace("-", "_")


def _matching(name: str, entries: list[zoo.ZooEntry]) -> list[zoo.ZooEntry]:
    """The entries a name can mean: the one that is called so, or all that begin so."""
    wanted = _folded(HEADLINE.get(name.lower(), name))
    exact = [e for e in entries if _folded(e.name) == wanted]
    return exact or [e for e in entries if wanted and _folded(e.name).startswith(wanted)]


def _resolve_zoo(name: str, dataset: str | None, threat: str) -> ModelSource:
    entries = zoo.zoo_entries()
    zoo_datasets = list(dict.fromkeys(e.dataset for e in entries))
    # images in a folder of one's own say nothing about the model's data set
    dataset = dataset if dataset in zoo_datasets else "cifar10"
    here = [e for e in entries if (e.dataset, e.threat) == (dataset, threat)]
    found = _matching(name, here)
    if len(found) == 1:
        return ModelSource(found[0].name, "zoo", dataset, threat)
    where = f"RobustBench's {dataset} models for {threat}"
    if found:
        listed = ", ".join(e.name for e in found)
        raise ModelNotFound(
            f"{name!r} can mean {len(found)} of {where}: {listed}", hint=f"choose one: --model {found[0].name}"
        )
    elsewhere = _matching(name, entries)
    if elsewhere:
        options = "\n".join(f"  --model {e.name} --dataset {e.dataset} --threat {e.threat}" for e in elsewhere[:8])
        raise ModelNotFound(f"no {name!r} among {where}", hint=f"the zoo has it elsewhere:\n{options}")
    raise ModelNotFound(
        f"no model is called {name!r}",
        hint=f"{_nearest(name, [e.name for e in here] + list(EMBEDDED))}; every name: meansparse models",
    )


def _nearest(name: str, known: list[str]) -> str:
    """The most similar names; a paper's name is compared with what stands before the architecture."""
    by_spelling = {_folded(k).split("_")[0]: k for k in reversed(known)} | {_folded(k): k for k in known}
    close = [by_spelling[s] for s in difflib.get_close_matches(_folded(name), by_spelling, n=5, cutoff=0.55)]
    return f"did you mean {', '.join(dict.fromkeys(close))}" if close else "nothing comes near"


def _call_factory(name: str) -> nn.Module:
    """Build the user's own network: ``module:attribute``, looked for in the current directory too.

    Weights drawn at random are the same in each stage: PyTorch's generator is seeded meanwhile.
    """
    module_name, _, attribute = name.rpartition(":")
    said_to_people = contextlib.redirect_stdout(sys.stderr)  # stdout is for the path of the report
    with _found_first(module_name), torch.random.fork_rng(devices=[]), said_to_people:
        torch.default_generator.manual_seed(0)
        module = _import_module(module_name, name)
        try:
            factory = getattr(module, attribute)
        except AttributeError:
            public = [n for n in vars(module) if not n.startswith("_") and callable(getattr(module, n))]
            close = difflib.get_close_matches(attribute, public, n=5, cutoff=0)
            hint = f"it has {', '.join(close) or 'nothing that can be called'}"
            raise ModelNotFound(f"{module_name} has no {attribute!r}", hint=hint) from None
        try:
            model = factory if isinstance(factory, nn.Module) else factory()
        except Exception as error:  # the user's code may raise anything
            raise ModelNotFound(
                f"{name}() failed: {type(error).__name__}: {error}", hint="it is called without arguments"
            ) from error
    if not isinstance(model, nn.Module):
        raise ModelNotFound(f"{name}() gave {type(model).__name__}, expected a torch.nn.Module")
    return model


def _import_module(module_name: str, name: str) -> ModuleType:
    try:
        if module_name.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"_factory_{Path(module_name).stem}", module_name)
            assert spec is not None and spec.loader is not None  # always, for a name that ends in .py
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # where dataclasses and pickle look for it
            spec.loader.exec_module(module)
            return module
        return importlib.import_module(module_name)
    except Exception as error:  # the user's code may raise anything
        is_absent = isinstance(error, FileNotFoundError) or getattr(error, "name", None) == module_name
        reason = "no such module" if is_absent else f"importing it failed: {type(error).__name__}: {error}"
        raise ModelNotFound(
            f"{name}: {reason}", hint=f"--model module:factory looks in {Path.cwd()} and among the installed packages"
        ) from error


@contextlib.contextmanager
def _found_first(module_name: str) -> Iterator[None]:
    """What lies in the current directory, and beside a ``file.py``, is found before what is installed."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    if module_name.endswith(".py"):
        sys.path.insert(1, str(Path(module_name).resolve().parent))
    importlib.invalidate_caches()  # the file may be younger than the directory's listing
    try:
        yield
    finally:
        sys.path[:] = before


def training_of(source: ModelSource) -> dict[str, Any]:
    """What the weights of an embedded or trained network say of themselves (activation, width, method, ...); {} for others."""
    if source.kind != "embedded":
        return {}
    header = _read_metadata(embedded_weights(source))
    # the shipped models are of before that was written down; both were trained by PGD
    training = json.loads(header["training"]) if "training" in header else {"method": "pgd"}
    return {**training, **json.loads(header.get("network", "{}"))}


def _read_metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"no file {path}", hint="name a file that `meansparse train` wrote")
    try:
        with safe_open(path, framework="pt") as tensors:
            return dict(tensors.metadata() or {})
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file: {error}", hint="make it again: meansparse train"
        ) from error


def _load_embedded(path: Path) -> ResNet18:
    metadata = _read_metadata(path)
    try:
        settings: dict[str, Any] = json.loads(metadata["network"])
        build: Callable[..., ResNet18] = ResNet18
        model = build(**settings)
    except KeyError as error:
        raise CheckpointError(
            f"{path} does not say which network it is for ({error} not found in its header)",
            hint="expected a file that `meansparse train` wrote",
        ) from error
    except (ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: its header describes no network: {error}", hint="make it again: meansparse train"
        ) from error
    fit_weights(model, read_checkpoint(path), what=str(path), mend="make it again: meansparse train")
    return model
