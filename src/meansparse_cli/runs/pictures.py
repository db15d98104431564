"""People's pictures as a model takes them: how many channels, and which class each of ImageNet's folders is."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..data.imagenet import class_numbers
from ..data.read import FileImages


def read_as_taken(
    images: FileImages, picture: Tensor, image_shape: tuple[int, ...] | None, build: Callable[[], nn.Module]
) -> None:
    """Grey pictures with one channel where the model takes one; ImageNet's classes where it has all of them.

    ``picture`` (3, height, width) is one of them. ``image_shape`` is the model's where it is known; where it is not,
    ``build`` gives the model, which is asked.
    """
    is_grey = bool((picture == picture[:1]).all())
    images.is_grey = is_grey and image_shape is not None and image_shape[0] == 1
    if not images.has_imagenet_names and (not is_grey or image_shape is not None):
        return
    model = build()
    n_logits = _n_logits(model, picture)
    if is_grey and image_shape is None and n_logits is None:
        n_logits = _n_logits(model, picture[:1])
        images.is_grey = n_logits is not None
    if n_logits == len(class_numbers()) and images.has_imagenet_names:
        images.number_classes(class_numbers())


def _n_logits(model: nn.Module, picture: Tensor) -> int | None:
    """How many logits the model gives an image; None where it does not take it."""
    device = next((tensor.device for tensor in model.parameters()), picture.device)
    try:
        with torch.no_grad():
            logits = model(picture.expand(2, -1, -1, -1).to(device))
    except Exception:  # the user's code may raise anything; ``check_model`` says what
        return None
    return int(logits.shape[-1]) if isinstance(logits, Tensor) else None
