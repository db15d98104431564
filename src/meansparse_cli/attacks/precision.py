"""What a search computes in. The judge always computes in float32 (``full_float32``)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

from ..errors import ConfigError
from ..operator.device import float32_set_to, full_float32

Precision = Literal["fp32", "tf32", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


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
