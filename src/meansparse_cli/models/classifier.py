"""A network that code of the user's built, held to what every stage relies on: images in, logits out, known weights.

Here alone a network's output becomes logits, for all that ask it: sites, statistics, attacks and the judge.
"""

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import DataError, ModelNotFound
from ..foreign import reading
from ..sites.find import unwrap

log = logging.getLogger(__name__)
_said: set[str] = set()
"""What was said of outputs in this process: once is enough, however many stages it does."""


def as_classifier(network: nn.Module, name: str) -> nn.Module:
    """``network`` itself, in eval mode: it gets images of its own to write on, and gives logits (batch, classes) alone.

    Raises ModelNotFound for weights that are none yet or not plain numbers, and for one without an eval mode. The
    network raises DataError where its output holds no logits.
    """
    for key, value in network.state_dict(keep_vars=True).items():
        if reason := _not_plain(value):
            raise ModelNotFound(
                f"{name}() gave a network whose {key} is {reason}",
                hint="let the factory give it in floating point, dense, filled, and called once if it has lazy layers",
            )
    unmoved = f"{name}() gave a network that cannot be put in eval mode, as one of torch.export"
    with reading(ModelNotFound, unmoved, "give the network itself, not its export"):
        network.eval()
    inner = unwrap(network)
    if not isinstance(inner, torch.jit.ScriptModule):  # it takes no hooks, and no operator either
        inner.register_forward_pre_hook(_on_a_copy)
        inner.register_forward_hook(partial(_logits, name))
    return network


def _not_plain(value: Any) -> str:
    """What is wrong with one entry of a state dict."""
    if is_lazy(value):
        return "not there yet (a lazy layer)"
    if not isinstance(value, Tensor) or value.is_quantized:
        return "quantised or no tensor"
    if value.is_meta or value.layout != torch.strided:
        return "on the meta device: it has no values" if value.is_meta else f"of layout {value.layout}"
    return ""


def _on_a_copy(network: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # a network that normalises in place would change the examples that it is asked about again
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in args)


def _logits(name: str, network: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor:
    """A forward hook: ``logits`` of what the network of this name gave, or its first tensor."""
    logits = output if isinstance(output, Tensor) else _logits_within(output, name)
    n = len(args[0])
    if logits.ndim != 2 or len(logits) != n or not logits.is_floating_point():
        raise DataError(
            f"the model gives {logits.dtype} of shape {tuple(logits.shape)} for {n} images; "
            f"expected floating-point logits (batch, classes) = ({n}, classes)",
            hint=f"let {name} return its logits alone, for a batch of any size",
        )
    return logits


def _logits_within(output: Any, name: str) -> Tensor:
    kind, is_dict = type(output).__name__, isinstance(output, Mapping)
    named = output.get("logits") if is_dict else getattr(output, "logits", None)
    values = output.values() if is_dict else output if isinstance(output, Iterable) else ()
    found = [x for x in (named, *values) if isinstance(x, Tensor)]
    if not found:
        raise DataError(
            f"the model gives {kind} without a tensor in it; expected logits (batch, classes)",
            hint=f"let {name} return its logits alone",
        )
    what = "logits are" if found[0] is named else "first tensor is"
    if (taken := f"{name} gives {kind}: its {what} taken as logits") not in _said:
        _said.add(taken)
        log.info(taken)
    return found[0]
