"""What the commands ask of a model; nobody outside this package asks which kind it is (``source.py`` lists them)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from ..data.imagenet import ROBUSTBENCH, Preprocessing
from ..errors import CheckpointError, ConfigError
from .fitting import Fitted, fit_weights
from .names import Kind, ModelSource, WeightFile, Weights, ZooEntry
from .weights import read_checkpoint

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".tar", ".safetensors")


class ModelKind(ABC):
    """One model, by its source."""

    kind: ClassVar[Kind]
    names: ClassVar[str]
    """A pattern of the names, as typed, that are of this kind."""
    dataset: ClassVar[str] = "cifar10"
    """What its models were trained on where nothing else is known."""
    names_code: ClassVar[bool] = False
    """The name is that of code of the user's, which building the network runs."""

    entry: ZooEntry | None = None
    """RobustBench's key, if the model is of its zoo."""
    cache_subfolder: Path | None = None
    """Where in the cache its weights are kept; None where they stay where they are."""

    weights_key: str | None = None
    """Where in a file its weights are, for one that holds several sets that fit."""
    fitted: Fitted | None = None
    """What ``load`` found in the file."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source

    @classmethod
    def resolve(cls, name: str, dataset: str | None, threat: str) -> ModelSource:
        """The model of a name of this kind. Raises ModelNotFound, with what comes near, where there is none."""
        return ModelSource(name, cls.kind, dataset or cls.dataset, threat)

    @abstractmethod
    def weights(self) -> tuple[WeightFile, ...]:
        """The files of weights in the order ``load`` takes them; none where the network brings its own."""

    @abstractmethod
    def build(self, *, published_sites: bool = False, settings: dict[str, Any] | None = None) -> nn.Module:
        """The architecture, not filled; published operators are taken out of it.

        ``published_sites``: the architecture that has a place for each of the authors' operators, where RobustBench has
        one; the same logits. ``settings``: what ``network_settings`` gave.
        """

    def path_now(self, path: Path, origin: str) -> Path:
        """Where a file of weights that a report has at ``path`` lies now; its sha256 is for the caller to compare."""
        return path

    def preprocessing(self, named: str | None = None) -> Preprocessing | None:
        """``named``, by RobustBench's name, else the model's own; None for another data set than ImageNet.

        Raises ConfigError where ``named`` is none for ImageNet, whose pictures have all sizes, or one for other images.
        """
        dataset = self.source.dataset
        if named is not None and (named == "none") == (dataset == "imagenet"):
            raise ConfigError(
                f"--preprocessing {named} with a model of {dataset}",
                hint=f"ImageNet's pictures need one: {', '.join(ROBUSTBENCH)}; "
                "those of other data sets are taken as they are: none",
            )
        if dataset != "imagenet":
            return None
        return self._own_preprocessing() if named is None else ROBUSTBENCH[named]

    def _own_preprocessing(self) -> Preprocessing:
        return Preprocessing()

    def network_settings(self, weights: Sequence[Path]) -> dict[str, Any] | None:
        """What ``build`` has to be told of a network that its weights describe; None where the name says all."""
        return None

    def training(self) -> dict[str, Any]:
        """What the weights say of how they were trained (activation, width, method, ...); {} where they say nothing."""
        return {}

    def paths(self, weights: Weights) -> tuple[Path, ...]:
        """The files of weights one by one: a folder gives those an ensemble names, or else all it holds, sorted."""
        if not isinstance(weights, Path):
            return tuple(weights or ())
        names = [file.file_name for file in self.weights()]
        if len(names) > 1 and weights.name == names[0]:  # an ensemble goes by its first file
            return tuple(weights.with_name(name) for name in names)
        if not weights.is_dir():
            return (weights,)
        if names and all((weights / name).is_file() for name in names):
            return tuple(weights / name for name in names)
        found = tuple(sorted(p for p in weights.iterdir() if p.suffix in CHECKPOINT_SUFFIXES))
        if len(found) != max(1, len(names)):
            raise CheckpointError(
                f"{weights} holds {len(found)} checkpoints, {self.source.name} has {max(1, len(names))}",
                hint="name the file itself" if len(names) < 2 else f"expected {', '.join(names)}",
            )
        return found

    def load(
        self,
        weights: Weights = None,
        *,
        allow_pickle: bool = False,
        published_sites: bool = False,
        weights_key: str | None = None,
    ) -> nn.Module:
        """The network, filled: float32, on the CPU, in eval mode; ``published_sites`` as for ``build``.

        Raises CheckpointError for weights that cannot be used, ConfigError for ``weights_key`` without a file,
        DownloadError where a library cannot fetch them, ModelNotFound for a factory that is not there.
        """
        self.weights_key = weights_key
        paths = self.paths(weights) or [file.path for file in self.weights() if file.path is not None]
        if not paths and weights_key is not None:
            raise ConfigError(f"--weights-key {weights_key}: {self.source.name} reads no file of weights")
        network = self._load(paths, allow_pickle, published_sites) if paths else self._load_own()
        return network.cpu().float().eval()

    def _load(self, paths: Sequence[Path], allow_pickle: bool, published_sites: bool) -> nn.Module:
        network = self.build(published_sites=published_sites)
        checkpoint = read_checkpoint(paths[0], allow_pickle=allow_pickle)
        self.fitted = fit_weights(network, checkpoint, what=f"{paths[0]} as {self.source.name}", key=self.weights_key)
        return network

    def _load_own(self) -> nn.Module:
        """The network with weights that lie in no file: what ``build`` draws, or a library fetches."""
        return self.build()
