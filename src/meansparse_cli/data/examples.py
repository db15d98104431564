"""Examples as attacks and evaluations take them: images, true classes, and where each stands in its data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError


@dataclass(frozen=True)
class Examples:
    """n examples.

    ``x`` (n, channels, height, width) float32 in [0, 1], on any device; ``y`` (n,) int64 true classes, on the device of
    ``x``; ``indices`` (n,) int64 on the CPU, positions in the data set, which fix each example's random starts.
    """

    x: Tensor
    y: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def at(self, positions: Tensor) -> Examples:
        """The examples at ``positions`` (m,) int64 or (n,) bool, on any device."""
        there = positions.to(self.x.device)
        return Examples(self.x[there], self.y[there], self.indices[positions.cpu()])

    def to(self, device: str) -> Examples:
        """The same examples with images and classes on ``device``."""
        return Examples(self.x.to(device), self.y.to(device), self.indices)


def make_loader(
    images: Dataset[tuple[Tensor, int]], batch_size: int, n_workers: int = 0
) -> DataLoader[tuple[Tensor, int]]:
    """Batches of (images, labels) in order; nothing is shuffled, nothing is dropped."""
    return DataLoader(images, batch_size=batch_size, num_workers=n_workers, collate_fn=_stack)


def stack_examples(
    images: Dataset[tuple[Tensor, int]], n_workers: int = 0, on_batch: Callable[[int], None] = lambda n: None
) -> tuple[Tensor, Tensor]:
    """All images (n, channels, height, width) and labels (n,) of a split small enough for memory.

    ``on_batch`` is told how many images more were read.
    """
    batches = []
    for x, y in make_loader(images, 64, n_workers):
        batches.append((x, y))
        on_batch(len(x))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def _stack(pairs: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    sizes = sorted({tuple(x.shape) for x, _ in pairs})
    if len(sizes) > 1:
        raise DataError(
            f"images of several sizes: {in_words(sizes[0])} and {in_words(sizes[-1])}",
            hint="bring them to one size first",
        )
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


def in_words(shape: tuple[int, ...]) -> str:
    """``3 x 32 x 32``."""
    return " x ".join(str(size) for size in shape)
