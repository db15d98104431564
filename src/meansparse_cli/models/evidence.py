"""A second opinion on which axis of a tensor holds the channels, from autograd's record of how the tensor came about.

``sites/`` follows the forward pass; this file knows nothing of it. It walks back from a tensor to the nearest layer
whose layout is beyond doubt (a convolution or batch norm has its channels on axis 1, a linear layer or layer norm on
the last), counts the channels of that layer's own weights, and follows the views and permutations in between.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Shape = tuple[int, ...]
Axes = Sequence[int | None]
"""Where each axis of a tensor on the way lies in the one that was asked about; None: nowhere."""

MAX_NODES = 400
"""How far to walk back; the nearest layer is a handful of nodes away."""


@dataclass(frozen=True)
class ChannelEvidence:
    """``channels`` of the layer ``made_by`` (autograd's name of it), which lie on ``axis`` of the tensor."""

    axis: int
    channels: int
    made_by: str


def channel_evidence(x: Tensor) -> ChannelEvidence | None:
    """The nearest layer behind ``x``; None if there is none, or if a view in between mixed its channels with others.

    ``x`` must have been computed with gradients enabled.

    >>> import torch
    >>> x = torch.nn.Conv2d(3, 5, 1)(torch.rand(2, 3, 8, 8)).permute(0, 2, 3, 1).relu()
    >>> channel_evidence(x)
    ChannelEvidence(axis=3, channels=5, made_by='ConvolutionBackward0')
    """
    queue: deque[tuple[Any, Axes]] = deque([(x.grad_fn, range(x.ndim))])
    seen: set[Any] = set()
    while queue and len(seen) < MAX_NODES:
        node, axes = queue.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (layer := _layer(node)) is not None:
            if layer[0] < len(axes) and (axis := axes[layer[0]]) is not None:
                return ChannelEvidence(axis, layer[1], node.name())
            continue
        for parent, output in node.next_functions:
            if parent is not None and parent.name() != "torch::autograd::AccumulateGrad":
                before, after = _shape(parent, output), _shape(node)
                moved = [_moved(node, axis, before, after) for axis in range(len(before))]
                queue.append((parent, [None if axis is None else axes[axis] for axis in moved]))
    return None


def _shape(node: Any, output: int = 0) -> Shape:
    metadata = node._input_metadata
    return tuple(metadata[output].shape) if output < len(metadata) else ()


def _layer(node: Any) -> tuple[int, int] | None:
    """Channel axis of a layer's own output and its channel count, if ``node`` is a layer."""
    name = node.name()
    if name.startswith("ConvolutionBackward"):
        weight = node._saved_weight.shape
        return 1, weight[1] * node._saved_groups if node._saved_transposed else weight[0]
    if "BatchNormBackward" in name:
        return 1, len(node._saved_running_mean)
    if name.startswith("NativeGroupNormBackward"):
        return 1, node._saved_C
    if name.startswith("NativeLayerNormBackward") and len(node._saved_normalized_shape) == 1:
        return len(_shape(node)) - 1, node._saved_normalized_shape[0]
    if name.startswith(("AddmmBackward", "MmBackward")):
        return 1, node._saved_mat2_sym_sizes[1]
    return None


def _moved(node: Any, axis: int, before: Shape, after: Shape) -> int | None:
    """Where ``node`` moves an axis of its input (extents ``before``): the axis of its output, or None."""
    name = node.name()
    if name.startswith("PermuteBackward"):
        return [dim % len(after) for dim in _signed(node._saved_dims)].index(axis)
    if name.startswith("TransposeBackward"):
        a, b = (dim % len(after) for dim in _signed((node._saved_dim0, node._saved_dim1)))
        return {a: b, b: a}.get(axis, axis)
    if name.startswith("TBackward"):
        return 1 - axis
    # any other keeps an axis counted from the front or from the end, whichever side kept its extents
    if before[: axis + 1] == after[: axis + 1]:
        return axis
    from_end = len(after) - len(before) + axis
    return from_end if from_end >= 0 and before[axis:] == after[from_end:] else None


def _signed(dims: tuple[int, ...]) -> list[int]:
    """Autograd keeps negative axes as unsigned 64-bit numbers."""
    return [dim - 2**64 if dim >= 2**63 else dim for dim in dims]
