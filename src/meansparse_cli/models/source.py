"""From a name on the command line to a model.

digits, resnet18-w16               embedded: the weights come with the package
FILE.safetensors                   written by `meansparse train`
Bartoldson2024, wang2023better_w.. RobustBench's zoo: a name, or the beginning of just one
timm:NAME, torchvision:NAME        a model of these libraries, with its standard weights, behind its normalisation
module:factory, file.py:factory    the user's own network
"""

import re
from typing import Any

from torch import nn

from ..errors import ConfigError
from .factory import FactoryModel
from .kind import ModelKind
from .libraries import TimmModel, TorchvisionModel
from .names import ModelSource, Weights
from .trained import EmbeddedModel
from .zoo import ZooModel

KINDS: tuple[type[ModelKind], ...] = (EmbeddedModel, TimmModel, TorchvisionModel, FactoryModel, ZooModel)
"""A name is of the first whose pattern it fits; the zoo takes what is left."""

THREATS = {threat.lower(): threat for threat in ("Linf", "L2", "corruptions")}


def resolve_model(name: str, dataset: str | None = None, threat: str = "Linf") -> ModelSource:
    """Find the one model a name means. Raises ModelNotFound with the candidates, or with the nearest names.

    ``dataset`` is a data set's name, a path of images, or None (the model's own; CIFAR-10 in the zoo).
    """
    if (known := THREATS.get(threat.lower().removesuffix("_3d"))) is None:
        raise ConfigError(f"no threat model {threat!r}", hint=f"expected one of {', '.join(THREATS.values())}")
    kind = next(kind for kind in KINDS if re.fullmatch(kind.names, name, re.DOTALL))
    return kind.resolve(name, dataset, known)


def kind_of(source: ModelSource) -> ModelKind:
    """The model, able to say what it is made of."""
    for kind in KINDS:
        if kind.kind == source.kind:
            return kind(source)
    raise ConfigError(f"no kind of model {source.kind!r}", hint=f"known: {', '.join(kind.kind for kind in KINDS)}")


def load_model(source: ModelSource, weights: Weights = None, **options: Any) -> nn.Module:
    """The network of a model, filled: ``ModelKind.load`` and its options."""
    return kind_of(source).load(weights, **options)


def channels_taken(model: nn.Module) -> int | None:
    """How many channels the images have that a network takes, by its first convolution; None where it has none."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return None if first is None else first.in_channels
