"""Examples as attacks and evaluations take them: images, true classes, and where each stands in its data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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
