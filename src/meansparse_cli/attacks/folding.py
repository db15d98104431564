"""Batch normalisation folded into the convolution before it, while a search runs.

In evaluation mode a batch norm is a scale and a shift of each channel, which the convolution can do itself: a fifth of
the time of a small ResNet's passes. No source is edited and nothing is traced: one forward pass shows which convolution
hands its output to which batch norm, a second one, folded, that the logits stay. The judge never sees the folded form.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..operator.active import operators_off
from ..operator.device import full_float32

N_PROBES = 2
TOLERANCE = 1e-4
"""Of the largest logit. Rounding moves logits by 1e-6 of it; one whose output has another reader, far more."""


@dataclass(frozen=True)
class Fold:
    """A convolution with the weights that do its batch norm's work as well."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    weight: nn.Parameter
    bias: nn.Parameter


def find_folds(model: nn.Module, x: Tensor) -> list[Fold]:
    """The folds that ``model`` allows, in evaluation mode; none where the logits of the first of ``x`` would change.

    Costs two forward passes of two examples, which no count has.
    """
    probes = x[:N_PROBES]
    # not in TF32, and without the operators, whose step would turn rounding into a jump
    with torch.no_grad(), full_float32(x.device), operators_off(model):
        before, pairs = _pairs(model, probes)
        folds = [Fold(conv, norm, *_folded_weights(conv, norm)) for conv, norm in pairs]
        if not folds:
            return []
        with folded(folds):
            after = model(probes)
    if not isinstance(before, Tensor) or not torch.isfinite(before).all():
        return []  # whoever calls the model next says what is wrong with it
    is_same = (after - before).abs().max() <= TOLERANCE * before.abs().max()
    return folds if is_same else []


@contextmanager
def folded(folds: list[Fold]) -> Iterator[None]:
    """The model in its folded form for a while: the same values up to rounding, restored on leaving."""
    before = [(fold.conv.weight, fold.conv.bias) for fold in folds]
    for fold in folds:
        fold.conv.weight, fold.conv.bias = fold.weight, fold.bias
        fold.norm.forward = lambda x: x  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for fold, (weight, bias) in zip(folds, before, strict=True):
            fold.conv.weight, fold.conv.bias = weight, bias
            del fold.norm.forward


def _pairs(model: nn.Module, probes: Tensor) -> tuple[Any, list[tuple[nn.Conv2d, nn.BatchNorm2d]]]:
    """The logits of ``probes``, and each (convolution, batch norm) that run once, one directly after the other."""
    outputs: list[tuple[nn.Conv2d, Any]] = []
    inputs: list[tuple[nn.BatchNorm2d, Any]] = []
    convs = [m for m in model.modules() if type(m) is nn.Conv2d and _is_plain(m)]
    norms = [m for m in model.modules() if type(m) is nn.BatchNorm2d and _is_plain(m)]
    norms = [m for m in norms if not m.training and m.running_mean is not None]
    hooks = [m.register_forward_hook(lambda m, _, out: outputs.append((m, out))) for m in convs]
    hooks += [m.register_forward_pre_hook(lambda m, args: inputs.append((m, args[0]))) for m in norms]
    try:
        logits = model(probes)
    finally:
        for hook in hooks:
            hook.remove()
    made_by = {id(out): m for m, out in outputs}  # the tensors are alive in ``outputs``, so no id is used twice
    ran = [m for m, _ in (*outputs, *inputs)]
    read = [id(x) for _, x in inputs]
    once = {m for m in ran if ran.count(m) == 1}
    return logits, [
        (made_by[id(x)], norm)
        for norm, x in inputs
        if id(x) in made_by and read.count(id(x)) == 1 and {norm, made_by[id(x)]} <= once
    ]


def _is_plain(module: nn.Module) -> bool:
    """Nothing but the class's own forward pass: no hook, no forward of its own."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _folded_weights(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[nn.Parameter, nn.Parameter]:
    assert norm.running_mean is not None and norm.running_var is not None  # _pairs has left the others out
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    layout = (
        torch.channels_last if conv.weight.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    )
    return nn.Parameter(weight.detach().contiguous(memory_format=layout), False), nn.Parameter(bias.detach(), False)
