"""What counts as an activation.

A function is one by name, in every spelling that torch has. A module is one by behaviour, whatever its class is called:
each output element depends on its own input element alone, and not linearly. So a custom autograd activation counts,
and a softmax or a normalisation does not.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NAMES = [
    "relu",
    "relu6",
    "gelu",
    "silu",
    "elu",
    "celu",
    "selu",
    "leaky_relu",
    "prelu",
    "rrelu",
    "mish",
    "hardswish",
    "hardtanh",
    "softplus",
    "softsign",
    "tanh",
    "tanhshrink",
    "logsigmoid",
    "threshold",
]
ACTIVATION_NAMES = [name + ending for name in _NAMES for ending in ("", "_")]
"""Each as it is, and as it works in place."""
ACTIVATION_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    function
    for namespace in (F, torch, torch.Tensor, torch._C._nn)
    for name in ACTIVATION_NAMES
    if callable(function := getattr(namespace, name, None))
)
"""Every spelling of an activation as a function. Sigmoid is left out: alone it is a gate, or the inside of a Swish."""

# Modules that need no test, nor one that holds any of them: linear, or mixing positions.
_NEVER_ACTIVATIONS = (
    *(nn.modules.conv._ConvNd, nn.Linear, nn.Embedding),
    *(nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm),
    *(nn.Dropout, nn.modules.dropout._DropoutNd, nn.Identity, nn.Flatten),
    *(nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.Upsample, nn.Softmax),
)

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def operand(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that an activation function is applied to."""
    return args[0] if args else kwargs["input"]


def writes_in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of an activation function overwrites its input."""
    return (
        func.__name__.endswith("_") or kwargs.get("inplace") is True or (func is F.relu and len(args) > 1 and args[1])
    )


def may_be_activation(module: nn.Module, x: Tensor) -> bool:
    """Whether ``is_elementwise_nonlinear`` is worth asking for a module that receives ``x``.

    One with children can be an activation too, as a Swish that calls a sigmoid of its own; a container is none.
    """
    if not x.is_floating_point() or isinstance(module, _CONTAINERS):
        return False
    return not any(isinstance(part, _NEVER_ACTIVATIONS) for part in module.modules())


def is_elementwise_nonlinear(module: nn.Module, x: Tensor) -> bool:
    """Whether each output element depends on its own input element alone, and not linearly; ``x``: a real input."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator).to(x)
    scale = x.std().clamp_min(1e-3) if x.numel() > 1 else torch.ones_like(x)
    chosen = (torch.rand(x.shape, generator=generator) < 0.5).to(x.device)
    with torch.no_grad():
        try:
            here = module(x.clone())
            elsewhere = module(x.clone().copy_(torch.where(chosen, x + noise * scale, x)))
            if here.shape != x.shape:
                return False
            # not bit by bit: a kernel rounds differently where memory is laid out in another way
            moved = (here[~chosen] - elsewhere[~chosen]).abs()
            if bool((moved > 1e-5 * here[~chosen].abs() + 1e-7 * here.abs().max()).any()):
                return False
            # Second differences vanish for an affine function; steps of several sizes catch flat and kinked ones.
            for step in (noise * scale, 4 * noise * scale, torch.full_like(x, 4.0)):
                left, middle, right = module(x - step), module(x.clone()), module(x + step)
                bend = (left - 2 * middle + right).abs()
                if bool((bend > 1e-3 * (left.abs() + right.abs() + 1e-6)).any()):
                    return True
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False  # the module accepts nothing but what it was given
    return False
