"""Models of timm and torchvision, each behind the normalisation that its weights expect."""

import difflib
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..data.imagenet import Preprocessing
from ..errors import DownloadError, ModelNotFound
from ..foreign import reading
from .kind import ModelKind
from .names import ModelSource, WeightFile, plain_name

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """(n, channels, height, width) in [0, 1] -> the same, shifted and scaled by channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def normalized(network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """The network behind its normalisation, under the names of RobustBench's own wrapper."""
    return nn.Sequential(OrderedDict([("normalize", Normalize(mean, std)), ("model", network)]))


class LibraryModel(ModelKind):
    """``LIBRARY:NAME`` with the standard weights, for images in [0, 1]."""

    dataset = "imagenet"
    all_names: ClassVar[str]
    """Where the library lists its names."""

    def __init__(self, source: ModelSource) -> None:
        super().__init__(source)
        self.bare = source.name.removeprefix(f"{self.kind}:")
        self.cache_subfolder = Path(self.kind)

    @classmethod
    def resolve(cls, name: str, dataset: str | None, threat: str) -> ModelSource:
        bare = name.removeprefix(f"{cls.kind}:")
        if bare not in (names := cls._names(bare)):
            close = difflib.get_close_matches(bare, names, n=5, cutoff=0.5)
            meant = f"did you mean {', '.join(f'{cls.kind}:{c}' for c in close)}"
            hint = meant if close else f"see {cls.all_names}"
            raise ModelNotFound(f"{cls.kind} has no model {bare!r}", hint=hint)
        return super().resolve(name, dataset, threat)

    def weights(self) -> tuple[WeightFile, ...]:
        return (WeightFile(f"{plain_name(self.source.name)}.pt", self.source.name),)

    def build(self, *, published_sites: bool = False, settings: dict[str, Any] | None = None) -> nn.Module:
        with reading(ModelNotFound, f"{self.kind} cannot build {self.bare!r}"):  # the libraries raise their own kinds
            return self._create(with_weights=False)

    def _load_own(self) -> nn.Module:
        place = self._address() or f"{self.kind}'s model page"
        hint = f"get the file by hand from {place}, then: meansparse fetch --model {self.source.name} --from-file FILE"
        with reading(DownloadError, f"{self.kind} could not fetch the weights of {self.bare!r}", hint):
            return self._create(with_weights=True)

    @classmethod
    @abstractmethod
    def _names(cls, bare: str) -> Collection[str]:
        """Every name that the library shows, or just ``bare`` if it takes that."""

    @abstractmethod
    def _create(self, *, with_weights: bool) -> nn.Module:
        """The library's own network behind its normalisation."""

    @abstractmethod
    def _address(self) -> str | None:
        """Where the standard weights can be got by hand."""


class TimmModel(LibraryModel):
    """``timm:NAME``."""

    kind = "timm"
    all_names = "timm.list_models()"
    names = "timm:.*"

    @classmethod
    def _names(cls, bare: str) -> Collection[str]:
        import timm

        # older names that it no longer shows are taken too; behind the dot is which of the weights
        return [bare] if timm.is_model(bare.split(".")[0]) else timm.list_models()

    def _create(self, *, with_weights: bool) -> nn.Module:
        import timm

        network = timm.create_model(self.bare, pretrained=with_weights)
        facts = timm.data.resolve_data_config({}, model=network)
        return normalized(network, facts["mean"], facts["std"])

    def _address(self) -> str | None:
        import timm

        facts = timm.get_pretrained_cfg(self.bare)
        hub_id = facts.hf_hub_id if facts else None
        return f"https://huggingface.co/{hub_id}" if hub_id else facts and facts.url

    def _own_preprocessing(self) -> Preprocessing:
        return timm_preprocessing(self.bare)


def timm_preprocessing(name: str) -> Preprocessing:
    """What timm's standard weights of ``name`` do to a picture."""
    import timm

    if (known := timm.get_pretrained_cfg(name)) is None:
        return Preprocessing()
    size = known.input_size[1]
    return Preprocessing(
        size, int(size / known.crop_pct), "bilinear" if known.interpolation == "bilinear" else "bicubic"
    )


class TorchvisionModel(LibraryModel):
    """``torchvision:NAME``."""

    kind = "torchvision"
    all_names = "torchvision.models"
    names = "torchvision:.*"

    @classmethod
    def _names(cls, bare: str) -> Collection[str]:
        from torchvision.models import list_models

        return list_models()

    def _create(self, *, with_weights: bool) -> nn.Module:
        from torchvision.models import get_model

        facts = self._facts("transforms")
        network = get_model(self.bare, weights="DEFAULT" if with_weights else None)
        return normalized(network, getattr(facts, "mean", IMAGENET_MEAN), getattr(facts, "std", IMAGENET_STD))

    def _address(self) -> str | None:
        return self._facts("url")  # type: ignore[no-any-return]

    def _own_preprocessing(self) -> Preprocessing:
        known = self._facts("transforms")
        if not hasattr(known, "crop_size"):
            return Preprocessing(interpolation="bilinear")
        return Preprocessing(known.crop_size[0], known.resize_size[0], known.interpolation.value)

    def _facts(self, name: str) -> Any:
        """What torchvision says of its standard weights; None where it has none."""
        from torchvision.models import get_model_weights

        value = getattr(getattr(get_model_weights(self.bare), "DEFAULT", None), name, None)
        return value() if callable(value) else value
