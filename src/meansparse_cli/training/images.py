"""Training images as bytes: decoded once, by several processes where asked for, and kept on the device.

They are augmented there: no loop over images, no wait, no workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.examples import stack, stack_examples
from ..data.read import ArrayImages
from ..data.splits import Split
from ..errors import ConfigError

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
    return stack_examples(images, n_workers, on_images or (lambda n: None), collate=_as_bytes)


def _as_bytes(examples: Sequence[tuple[Tensor, int]]) -> Pixels:
    x, y = stack(examples)
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous(), y


class DeviceImages:
    """A training set in the device's memory: ``pixels`` uint8 (n, height, width, channels), ``labels`` (n,).

    ``batch`` draws a crop at a random offset after zero padding by ``padding`` pixels, and a flip, for each image.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, *, device: str, padding: int, flip: bool, channels_last: bool
    ) -> None:
        self.n, self.height, self.width, self.channels = pixels.shape
        _check_memory(self.n * (self.height + 2 * padding) * (self.width + 2 * padding) * self.channels, device)
        self.padding, self.flip, self.channels_last = padding, flip, channels_last
        self._padded = F.pad(pixels.to(device), (0, 0, padding, padding, padding, padding))
        self._labels = labels.to(device)

    def __len__(self) -> int:
        return self.n

    def batch(self, chosen: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images (batch, channels, height, width) in [0, 1] and labels, at ``chosen``; all of it on the device."""
        n, device = len(chosen), chosen.device
        rows = torch.arange(self.height, device=device).expand(n, -1)
        columns = torch.arange(self.width, device=device).expand(n, -1)
        if self.flip:
            flipped = torch.rand(n, 1, device=device, generator=generator) < 0.5
            columns = torch.where(flipped, self.width - 1 - columns, columns)
        if self.padding:
            offsets = torch.randint(0, 2 * self.padding + 1, (2, n, 1), device=device, generator=generator)
            rows, columns = rows + offsets[0], columns + offsets[1]
        x = self._padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.float().div_(255).contiguous(memory_format=layout), self._labels[chosen]


def _check_memory(n_bytes: int, device: str) -> None:
    if torch.device(device).type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if n_bytes > 0.8 * free:
        raise ConfigError(
            f"the training images take {n_bytes / 2**30:.0f} GiB, the device has {free / 2**30:.0f} GiB free",
            hint="train on fewer: --n-examples N",
        )
