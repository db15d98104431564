"""Which axis of a tensor is the channel, from what produced it.

A convolution puts its channels on axis 1, a linear layer on the last one; a normalisation, an activation or an addition
leaves them where they are. What only moves elements (permute, reshape, indexing, ...) is asked itself: it is run once
more on a tensor that holds each element's channel number, and the channel axis is the one along which the numbers
change.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Layout = Literal["channels-first", "channels-last", "tokens", "flat"]

_RESHAPES = "reshape view _unsafe_view reshape_as view_as flatten ravel unflatten squeeze squeeze_ unsqueeze unsqueeze_"
_PERMUTES = "permute transpose transpose_ swapaxes swapdims movedim moveaxis t adjoint roll flip __get__"
_SELECTS = "__getitem__ select narrow index_select chunk split tensor_split unbind expand expand_as repeat tile"
MOVES_ELEMENTS = frozenset(f"{_RESHAPES} {_PERMUTES} {_SELECTS}".split())
"""Functions whose result holds elements of the first argument, nothing computed. ``__get__`` is ``x.T``, ``x.data``."""

_REDUCES = frozenset({"mean", "sum", "amax", "nanmean"})
_CHANNELS_FIRST = ("conv", "batch_norm", "group_norm", "instance_norm", "pixel_shuffle", "interpolate")
_CHANNELS_LAST = frozenset({"linear", "matmul", "__matmul__", "bmm", "scaled_dot_product_attention"})


def axis_or_default(axis: int | None, ndim: int) -> int:
    """The axis where one is known; else tokens are (batch, position, channel) and all others channels-first."""
    return min(axis if axis is not None else {3: 2}.get(ndim, 1), ndim - 1)


def layout_of(ndim: int, axis: int) -> Layout:
    """The name of a layout: by the number of axes, batch included, and the channel's place among them."""
    if ndim == 2:
        return "flat"
    if axis == ndim - 1:
        return "tokens" if ndim == 3 else "channels-last"
    return "channels-first"


def positions(shape: Sequence[int], axis: int) -> int:
    """Values that one channel takes in one image: 1 where there is no spatial extent."""
    return math.prod(shape) // max(1, shape[0] * shape[axis])


def axes_after_moving(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], shape: Sequence[int], axis: int
) -> list[int | None] | None:
    """The channel axis of each tensor that ``func`` returned, if it moves or reduces its first argument's elements.

    ``shape`` and ``axis`` are those of the first argument before the call. None for any other function.
    """
    name = getattr(func, "__name__", "")
    if name not in MOVES_ELEMENTS and name not in _REDUCES:
        return None
    numbers = torch.arange(shape[axis], dtype=torch.float32).view([-1 if i == axis else 1 for i in range(len(shape))])
    numbers = numbers.to(args[0].device).expand(*shape).clone()
    try:
        moved = func(numbers, *args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
    except (RuntimeError, TypeError, IndexError):
        return None
    return [_varying_axis(x) for x in (moved if isinstance(moved, tuple | list) else [moved]) if isinstance(x, Tensor)]


def axis_after(
    func: Callable[..., Any], out: Tensor, known: Sequence[tuple[tuple[int, ...], int]], first: int | None
) -> int | None:
    """The channel axis of ``out``, computed by ``func``, or None where nothing is known.

    ``known`` are shape and channel axis of each argument that has one, ``first`` the axis of the first argument.
    """
    if out.ndim < 2:
        return None
    name = getattr(func, "__name__", "")
    if any(word in name for word in _CHANNELS_FIRST):
        return 1
    if name in _CHANNELS_LAST:
        return out.ndim - 1
    if name in ("layer_norm", "rms_norm"):
        return first if first is not None else out.ndim - 1
    if not known:
        return None
    shape, axis = max(known, key=lambda pair: torch.Size(pair[0]).numel())
    if out.ndim == len(shape) and (out.shape[axis] == shape[axis] or name in ("cat", "pad")):
        return axis
    if axis == len(shape) - 1 and out.shape[-1] == shape[-1]:
        return out.ndim - 1
    if axis < out.ndim and out.shape[axis] == shape[axis]:
        return axis
    return None


def _varying_axis(numbers: Tensor) -> int | None:
    """The one axis along which channel numbers change, each different from the others; None if there is none."""
    for axis in range(numbers.ndim):
        along = numbers[tuple(slice(None) if i == axis else slice(0, 1) for i in range(numbers.ndim))]
        if numbers.shape[axis] > 1 and bool((numbers == along).all()) and len(along.unique()) == along.numel():
            return axis
    return None
