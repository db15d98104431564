"""What keeps another library's attack from harming its caller, or itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEAST_GRADIENT = 1e-10  # below it FAB's projections divide by what has underflowed
TINY_GRADIENT = 1e-6  # stands in for such a gradient; above the 1e-8 that FAB's L2 projection takes for zero


@contextmanager
def isolated_rng(device: torch.device) -> Iterator[None]:
    """Restores the global generators of torch (CPU and ``device``) and numpy on leaving."""
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)


def contiguous_gradients(images: Tensor) -> Tensor:
    """``images``, contiguous, through which a gradient comes back contiguous and for no image zero.

    A network in channels-last sends back gradients that ``view`` refuses. A gradient of zeros, which a sparsified
    network can have, makes FAB divide by zero and lose what it had found for that image.
    """
    result: Tensor = _ContiguousGradient.apply(images)
    return result


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.contiguous().view_as(images)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].contiguous()
        zero = (grad.abs().flatten(1).amax(dim=1) < LEAST_GRADIENT).view(-1, *[1] * (grad.ndim - 1))
        return torch.where(zero, torch.full_like(grad, TINY_GRADIENT), grad)
