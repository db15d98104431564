"""Where the activations of a model are, and which axis of their input is the channel.

A site is one place in a forward pass where an activation receives its input. They are found by running the model, not
by reading its source. Two kinds exist:

- ``module``: a leaf module that acts element by element and not linearly, whatever its class is called;
- ``function``: a call such as ``F.relu`` or ``torch.relu_`` made by a module that is no activation itself.
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import SiteError
from .activations import ACTIVATION_NAMES
from .channels import Layout, layout_of
from .trace import Tracer, trace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """One place where an activation receives its input.

    ``name`` is the module path, with the call's index where a module or function is called more than once
    (``layer1.0.relu#1``). ``shape`` is that of the input without the batch axis. ``call`` counts the calls of this
    module, ``ordinal`` all functional activation calls of the forward pass (-1 for a module). ``index`` is the place in
    the list of all sites, gates included. ``after_addition`` and ``main_path``: see ``residual.py``.
    """

    index: int
    name: str
    path: str
    kind: Literal["module", "function"]
    operation: str
    layout: Layout
    channel_axis: int
    channels: int
    shape: tuple[int, ...]
    gate: bool
    call: int = 0
    n_calls: int = 1
    ordinal: int = -1
    after_addition: bool = False
    main_path: bool = False


class Sites(list[Site]):
    """Sites in call order. ``unseen``: the modules that ran code whose insides cannot be seen, with its activations."""

    unseen: tuple[str, ...] = ()


def find_sites(model: nn.Module, images: Tensor) -> Sites:
    """All sites of ``model`` in call order, gates included and marked; ``images`` (batch, channels, height, width).

    The model is run twice, on ``images`` and on their mirror image in a batch larger by one, and left as it was. Raises
    DataError if its forward pass fails, SiteError if it has no activation or if the two runs disagree.
    """
    model = unwrap(model)
    if any(hasattr(module, "mean_sparse") for module in model.modules()):
        raise SiteError("this model has operators already", hint="take them out first: remove(model)")
    mirrored = images.flip(-1)
    with untouched(model):
        is_activation: dict[str, bool] = {}
        tracer = trace(model, images, is_activation)
        sites = _number(tracer)
        again = _number(trace(model, torch.cat([mirrored, mirrored[:1]]), is_activation))
    _compare(sites, again)
    sites.unseen = _unseen(tracer)
    words = f"code whose insides cannot be seen (scripted, traced, exported) in {', '.join(sites.unseen)}"
    if not sites:
        raise SiteError(
            f"no activation was found in this model{', but ' + words if sites.unseen else ''}",
            hint="MeanSparse needs at least one non-linear activation, in code that is plain Python",
        )
    if sites.unseen:
        log.warning(f"{words}: no operator can stand there, and activations in it are not among the sites")
    return sites


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside ``DataParallel`` or ``torch.compile``: sites are named by its own module paths."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; afterwards every module is in its own mode again, and every buffer as it was."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _unseen(tracer: Tracer) -> tuple[str, ...]:
    """``stem (relu)``: where code ran unseen, with the activations in it that go by a name."""
    found: dict[str, list[str]] = {}
    for path, operation in tracer.unseen:
        found.setdefault(path, []).extend([operation] if operation in ACTIVATION_NAMES else [])
    return tuple(f"{path} ({', '.join(dict.fromkeys(names))})" if names else path for path, names in found.items())


def _number(tracer: Tracer) -> Sites:
    totals, seen = Counter(found.path for found in tracer.found), Counter[str]()
    sites = Sites()
    for index, found in enumerate(tracer.found):
        nth = seen[found.path]
        seen[found.path] += 1
        path, axis, shape = found.path, found.axis, found.shape
        name = path or "(model)"
        sites.append(
            Site(
                index,
                f"{name}#{nth}" if totals[path] > 1 else name,
                path,
                found.kind,
                found.operation,
                layout_of(len(shape), axis),
                axis,
                shape[axis],
                shape[1:],
                gate=found.positions == 1 and tracer.paths.scales_features(found.bit),
                call=found.call,
                n_calls=tracer.calls[path] if found.kind == "module" else 1,
                ordinal=found.ordinal,
                after_addition=found.came.after_addition,
                main_path=not found.came.after_addition and tracer.paths.on_main_path(found.bit),
            )
        )
    return sites


def _compare(sites: Sequence[Site], again: Sequence[Site]) -> None:
    """Refuse a model whose two runs differ in their activations or in the channels of one."""
    for a, b in zip_longest(map(_call, sites), map(_call, again), fillvalue="nothing"):
        if a != b:
            raise SiteError(
                f"the sites depend on the input: {len(sites)} activations on one batch, {len(again)} on another; "
                f"where they part, one calls {a}, the other {b}",
                hint="such a model has no fixed place to put the operator",
            )
    for site, other in zip(sites, again, strict=True):
        if (site.channel_axis, site.channels) != (other.channel_axis, other.channels):
            raise SiteError(
                f"{site.name} has a dynamic layout: {_channels(site)} on one batch, {_channels(other)} on another",
                hint="statistics per channel need channels that stay the same",
            )


def _call(site: Site) -> str:
    return f"{site.name} ({site.operation}{'()' if site.kind == 'function' else ''})"


def _channels(site: Site) -> str:
    return f"{site.channels} channels on axis {site.channel_axis} of {len(site.shape) + 1}"
