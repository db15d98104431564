"""Examples as attacks and evaluations take them: images, true classes, and where each stands in its data set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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

    def at(self, positions: Tensor) -> "Examples":
        """The examples at ``positions`` (m,) int64 or (n,) bool, on any device."""
        there = positions.to(self.x.device)
        return Examples(self.x[there], self.y[there], self.indices[positions.cpu()])

    def to(self, device: str) -> "Examples":
        """The same examples with images and classes on ``device``."""
        return Examples(self.x.to(device), self.y.to(device), self.indices)


def stack(pairs: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """A batch of images and their labels (n,). Raises DataError for images of several sizes."""
    sizes = sorted({tuple(x.shape) for x, _ in pairs})
    if len(sizes) > 1:
        raise _several_sizes(sizes[0], sizes[-1])
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


Collate = Callable[[Sequence[tuple[Tensor, int]]], tuple[Tensor, Tensor]]


def make_loader(
    images: Dataset[tuple[Tensor, int]], batch_size: int, n_workers: int = 0, collate: Collate = stack
) -> DataLoader[tuple[Tensor, int]]:
    """Batches of (images, labels) in order; nothing is shuffled, nothing is dropped."""
    return DataLoader(images, batch_size=batch_size, num_workers=n_workers, collate_fn=collate)


IN_MEMORY = 2 << 30
"""Bytes of images; more than these lie in a file, of which memory holds what is looked at."""


def stack_examples(
    images: Dataset[tuple[Tensor, int]],
    n_workers: int = 0,
    on_batch: Callable[[int], None] = lambda n: None,
    *,
    spill: Path | None = None,
    collate: Collate = stack,
) -> tuple[Tensor, Tensor]:
    """All images (n, channels, height, width), or what ``collate`` makes of them, and labels (n,) of a split.

    ``on_batch`` is told how many images more were read. ``spill``: where images that take more than ``IN_MEMORY`` are
    put, in a file without a name, which ends with the process.
    """
    n, done = len(images), 0  # type: ignore[arg-type]
    x, y = torch.zeros(0, 1, 1, 1), torch.zeros(n, dtype=torch.int64)
    for part, labels in make_loader(images, 64, n_workers, collate):
        if not done:
            x = _room(n, part, spill)
        elif part.shape[1:] != x.shape[1:]:
            raise _several_sizes(tuple(x.shape[1:]), tuple(part.shape[1:]))
        x[done : done + len(part)], y[done : done + len(part)] = part, labels
        done += len(part)
        on_batch(len(part))
    return x, y


def _room(n: int, part: Tensor, spill: Path | None) -> Tensor:
    """For n images like those of ``part`` (m, channels, height, width)."""
    shape = (n, *part.shape[1:])
    if spill is None or n * part[0].numel() * part.element_size() <= IN_MEMORY:
        return torch.empty(shape, dtype=part.dtype)
    spill.parent.mkdir(parents=True, exist_ok=True)
    spill.unlink(missing_ok=True)
    room = torch.from_file(str(spill), shared=True, size=n * part[0].numel(), dtype=part.dtype).view(shape)
    spill.unlink()
    return room


def _several_sizes(one: tuple[int, ...], other: tuple[int, ...]) -> DataError:
    return DataError(
        f"images of several sizes: {in_words(one)} and {in_words(other)}", hint="bring them to one size first"
    )


def in_words(shape: tuple[int, ...]) -> str:
    """``3 x 32 x 32``."""
    return " x ".join(str(size) for size in shape)
