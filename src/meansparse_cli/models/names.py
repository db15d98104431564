"""What a model is called: the record in ``fetch.yaml``, RobustBench's key, its files, the options of a command."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

Kind = Literal["zoo", "embedded", "timm", "torchvision", "factory"]
EMBEDDED = {"digits": "digits", "resnet18-w16": "cifar10"}
"""The models of the package itself, to the data sets they were trained on."""
Weights = Path | Sequence[Path] | None
"""A file; an ensemble's files in order, or the folder that holds them; None for what a model comes with."""


@dataclass(frozen=True)
class ZooEntry:
    """One model of the zoo, by the three words RobustBench uses: the same name can stand in several tables."""

    name: str
    dataset: str
    threat: str


@dataclass(frozen=True)
class ModelSource:
    """A model that is known to exist: ``dataset`` and ``threat`` are what it was trained for, as far as known."""

    name: str
    kind: Kind
    dataset: str
    threat: str

    @property
    def entry(self) -> ZooEntry:
        """The zoo's key, for a model of the zoo."""
        return ZooEntry(self.name, self.dataset, self.threat)


@dataclass(frozen=True)
class WeightFile:
    """One file of weights: its name in the cache and where it comes from; ``sha256`` may be the beginning of a digest.

    ``origin`` is an address, the name of a library's model, or a word for the package itself. ``path``: where the file
    lies already, so that the cache need not hold it.
    """

    file_name: str
    origin: str
    sha256: str | None = None
    path: Path | None = None


def model_options(model: ModelSource | ZooEntry) -> str:
    """`` --model NAME``, with the data set and the threat where the name alone would mean another model."""
    # an embedded model's weights say what they were trained on
    is_known = model.dataset == "cifar10" or (isinstance(model, ModelSource) and model.kind == "embedded")
    dataset_option = "" if is_known else f" --dataset {model.dataset}"
    threat_option = "" if model.threat == "Linf" else f" --threat {model.threat}"
    return f" --model {model.name}{dataset_option}{threat_option}"


def fetch_command(model: ModelSource | ZooEntry) -> str:
    """The command that downloads a model, with only the options it needs."""
    return f"meansparse fetch{model_options(model)}"


@cache
def package_data(name: str) -> dict[str, Any]:
    """``published.json``; or ``zoo.yaml``, what RobustBench itself does not say of its entries."""
    text = (resources.files(__package__) / name).read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text) if name.endswith(".json") else yaml.safe_load(text)
    return content


def plain_name(name: str) -> str:
    """A model's name as a file name."""
    return re.sub(r"[^\w.+-]+", "_", name.removeprefix("timm:")).strip("._") or "model"
