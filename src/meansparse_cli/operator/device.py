"""The device of a model, and the precision that it computes in: float32, TF32 products on a GPU, or autocast."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import nn

from ..errors import ConfigError

log = logging.getLogger(__name__)
Precision = Literal["fp32", "tf32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def device_of(model: nn.Module, default: torch.device | None = None) -> torch.device:
    """The device of the model's first parameter or buffer; ``default`` (the CPU) for a model without either."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return default or torch.device("cpu")


KERNELS_FOR = "cuda"
"""The type of device whose tensors kernels of our own take."""


def has_kernels(x: torch.Tensor) -> bool:
    """Is ``x`` on a GPU for which Triton can make kernels?"""
    return x.device.type == KERNELS_FOR and _kernels_work(str(x.device))


@cache
def _kernels_work(device: str) -> bool:
    if find_spec("triton") is None:
        return False
    from .kernels import agree_with_torch  # needs Triton, which takes a while to load

    try:
        fault = "" if agree_with_torch(torch.device(device)) else "they give other values than torch"
    except Exception as error:  # Triton needs a compiler, and a GPU that is not too old, and raises what it likes
        fault = type(error).__name__
    if fault:
        log.warning(f"Triton makes no kernels on {device} ({fault}): the operator goes without")
    return not fault


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No autocast on ``device`` and no TF32, restored on leaving; PyTorch's default lets convolutions use TF32."""
    with float32_set_to("ieee"), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def float32_set_to(products: Literal["ieee", "tf32"]) -> Iterator[None]:
    """How a GPU multiplies float32 numbers, restored on leaving."""
    cudnn: Any = torch.backends.cudnn
    switches: tuple[Any, ...] = torch.backends.cuda.matmul, cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = products
        yield
    finally:
        for switch, old in zip(switches, before, strict=True):
            switch.fp32_precision = old


def precision_on(device: str, given: Precision | None) -> Precision:
    """``given``; else TF32 on a GPU, in which PyTorch computes convolutions there by default, and float32 elsewhere."""
    return given or ("tf32" if device.startswith("cuda") else "fp32")


@contextmanager
def search_precision(device: torch.device, precision: Precision | None) -> Iterator[None]:
    """``fp32``: float32 throughout. ``tf32``: TF32 products on a GPU. ``bf16``: autocast. None: as it is set."""
    if precision not in (None, *PRECISIONS):
        raise ConfigError(f"precision {precision!r} is not known", hint=f"one of: {', '.join(PRECISIONS)}")
    if precision is None:
        yield
    elif precision == "fp32":
        with full_float32(device):
            yield
    elif precision == "tf32":
        with float32_set_to("tf32"):
            yield
    else:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
