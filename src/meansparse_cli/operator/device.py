"""Where a model computes, and how float32 is computed there: TF32 or IEEE products on a GPU, autocast or not."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn


def device_of(model: nn.Module, default: torch.device | None = None) -> torch.device:
    """The device of the model's first parameter or buffer; ``default`` (the CPU) for a model without either."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return default or torch.device("cpu")


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No autocast on ``device`` and no TF32, restored on leaving; PyTorch's default lets convolutions use TF32."""
    with float32_set_to("ieee"), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def float32_set_to(products: Literal["ieee", "tf32"]) -> Iterator[None]:
    """How a GPU multiplies float32 numbers, restored on leaving."""
    value: str | bool
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and later, where reading the older switch may raise
        switches, value = ((matmul, "fp32_precision"), (cudnn.conv, "fp32_precision")), products
    else:
        switches, value = ((matmul, "allow_tf32"), (cudnn, "allow_tf32")), products == "tf32"
    before = [getattr(owner, name) for owner, name in switches]
    try:
        for owner, name in switches:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name), old in zip(switches, before, strict=True):
            setattr(owner, name, old)
