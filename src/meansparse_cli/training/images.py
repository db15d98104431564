"""The images of a split as bytes in memory, decoded once, by several processes where asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data.read import ArrayImages
from ..data.splits import Split
from ..errors import DataError

Pixels = tuple[Tensor, Tensor]
"""uint8 images (n, height, width, channels) and labels (n,)."""


@dataclass(frozen=True)
class TrainingData:
    """What is trained on, and what chooses the best epoch. ``images_id`` tells the training images from others."""

    train: Pixels
    selection: Pixels
    n_classes: int
    images_id: str = ""


def read_pixels(images: Split, n_workers: int = 0, on_images: Callable[[int], None] | None = None) -> Pixels:
    """Every image, in order. Raises DataError for mixed sizes."""
    source = images.dataset
    if isinstance(source, ArrayImages):
        indices = np.asarray(list(images.indices))
        return source.x[torch.from_numpy(indices)], torch.from_numpy(source.y[indices])
    pixels, labels = [], []
    loader: DataLoader[Any] = DataLoader(images, batch_size=128, num_workers=n_workers, collate_fn=_as_bytes)
    for x, y in loader:
        pixels.append(x)
        labels.append(y)
        if on_images is not None:
            on_images(len(y))
    if len({x.shape[1:] for x in pixels}) > 1:
        raise _mixed({tuple(x.shape[1:]) for x in pixels})
    return torch.cat(pixels), torch.cat(labels)


def _as_bytes(examples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    if len(shapes := {tuple(x.shape) for x, _ in examples}) > 1:
        raise _mixed(shapes)
    x = torch.stack([x for x, _ in examples])
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), torch.tensor([y for _, y in examples])


def _mixed(shapes: set[tuple[int, ...]]) -> DataError:
    return DataError(
        f"the images have several sizes: {', '.join(map(str, sorted(shapes)[:4]))}, ...; training needs one"
    )
