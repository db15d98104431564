"""Models of timm and torchvision, which expect normalised images: each stands behind the mean and std of its weights.

The attacks work in [0, 1], so the normalisation belongs inside the model, as RobustBench has it.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import DownloadError, ModelNotFound

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


def normalized(model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> nn.Module:
    """``model`` behind its normalisation, under the names of RobustBench's own wrapper."""
    return nn.Sequential(OrderedDict([("normalize", Normalize(mean, std)), ("model", model)]))


def check_timm_name(name: str) -> None:
    """Raises ModelNotFound for a model that timm does not have."""
    import timm

    if not timm.is_model(name.removeprefix("timm:").split(".")[0]):
        close = difflib.get_close_matches(name.removeprefix("timm:"), timm.list_models(), n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(f'timm:{c}' for c in close)}" if close else "see timm.list_models()"
        raise ModelNotFound(f"timm has no model {name.removeprefix('timm:')!r}", hint=hint)


def load_timm(name: str, *, with_weights: bool) -> nn.Module:
    """``timm:NAME`` for images in [0, 1]. Raises DownloadError where its weights cannot be fetched."""
    import timm

    bare = name.removeprefix("timm:")
    try:
        model = timm.create_model(bare, pretrained=with_weights)
    except Exception as error:  # timm, its hub client and their network layers each raise their own kinds
        if not with_weights:
            raise ModelNotFound(f"timm cannot build {bare!r}: {error}") from error
        raise DownloadError(
            f"timm could not fetch the weights of {bare!r}: {error}", hint=_timm_by_hand(name, bare)
        ) from error
    facts = timm.data.resolve_data_config({}, model=model)
    return normalized(model, facts["mean"], facts["std"])


def _timm_by_hand(name: str, bare: str) -> str:
    import timm

    facts = timm.get_pretrained_cfg(bare)
    hub_id = facts.hf_hub_id if facts else None
    place = (
        f"https://huggingface.co/{hub_id}" if hub_id else (facts.url if facts and facts.url else "timm's model page")
    )
    return f"get the file by hand from {place}, then: meansparse fetch --model {name} --from-file FILE"


def check_torchvision_name(name: str) -> None:
    """Raises ModelNotFound for a model that torchvision does not have."""
    from torchvision.models import list_models

    bare, known = name.removeprefix("torchvision:"), list_models()
    if bare not in known:
        close = difflib.get_close_matches(bare, known, n=5, cutoff=0.5)
        hint = f"did you mean {', '.join(f'torchvision:{c}' for c in close)}" if close else "see torchvision.models"
        raise ModelNotFound(f"torchvision has no model {bare!r}", hint=hint)


def load_torchvision(name: str, *, with_weights: bool) -> nn.Module:
    """``torchvision:NAME`` for images in [0, 1]. Raises DownloadError where its weights cannot be fetched."""
    from torchvision.models import get_model, get_model_weights

    bare = name.removeprefix("torchvision:")
    try:
        model = get_model(bare, weights="DEFAULT" if with_weights else None)
    except Exception as error:  # building and downloading each raise their own kinds
        if not with_weights:
            raise ModelNotFound(f"torchvision cannot build {bare!r}: {error}") from error
        url = getattr(getattr(get_model_weights(bare), "DEFAULT", None), "url", "torchvision's model page")
        raise DownloadError(
            f"torchvision could not fetch the weights of {bare!r}: {error}",
            hint=f"get the file by hand from {url}, then: meansparse fetch --model {name} --from-file FILE",
        ) from error
    facts = torchvision_transforms(name)
    return normalized(model, getattr(facts, "mean", IMAGENET_MEAN), getattr(facts, "std", IMAGENET_STD))


def torchvision_transforms(name: str) -> object | None:
    """What the standard weights of ``torchvision:NAME`` do to a picture: an object with ``resize_size``, ``crop_size``,
    ``interpolation``, ``mean`` and ``std`` for a classifier; None where torchvision says nothing.
    """
    from torchvision.models import get_model_weights

    weights = getattr(get_model_weights(name.removeprefix("torchvision:")), "DEFAULT", None)
    return None if weights is None else weights.transforms()  # type: ignore[no-any-return]
