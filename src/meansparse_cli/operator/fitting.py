"""Batches as large as the memory of a GPU takes: a batch that is too large is halved, and its model remembers."""

import logging
from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

log = logging.getLogger(__name__)
T = TypeVar("T")

_FITS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""The largest batch that a model did not run out of memory with, once it did with a larger one."""


def fitting(model: nn.Module, batch_size: int) -> int:
    """``batch_size``, or what is known to fit where that is less."""
    return min(batch_size, _FITS.get(model, batch_size))


def halving(model: nn.Module, batch_size: int, run: Callable[[int], T]) -> T:
    """``run(size)`` with the largest size up to ``batch_size`` that fits; it begins anew where memory ended.

    Raises ``torch.OutOfMemoryError`` where one image is too large.
    """
    while True:
        size = fitting(model, batch_size)
        try:
            return run(size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        _halve(model, size)  # out of the handler, which holds the tensors that were too many


def in_batches(model: nn.Module, n: int, batch_size: int, run: Callable[[slice], T]) -> list[T]:
    """What ``run`` makes of n rows, part by part and in order; a part that does not fit is halved and run again."""
    found, done = list[T](), 0
    while done < n:
        size = fitting(model, min(batch_size, n - done))
        try:
            found.append(run(slice(done, done + size)))
            done += size
            continue
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        _halve(model, size)
    return found


def _halve(model: nn.Module, size: int) -> None:
    """Remember that so many images are too many."""
    _FITS[model] = fitting(model, size // 2)
    torch.cuda.empty_cache()
    log.warning(f"out of memory with {size} images at a time: on with {size // 2}, which changes no result")
