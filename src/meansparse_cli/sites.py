"""Where the activations of a model are, and which axis of their input is the channel.

A site is one place in a forward pass where an activation receives its input. They are found by running the model, not by
reading its source. Two kinds exist:

- ``module``: a leaf module that is element-wise and not linear, whatever its class is called. That is tested by
  behaviour, so a custom autograd activation counts and a softmax or a normalisation does not.
- ``function``: a call such as ``F.relu`` or ``torch.relu_`` made by a module that is no activation itself.

The channel axis follows from what produced the tensor (a convolution, a linear layer, a permutation, ...).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import SiteError

Layout = Literal["channels-first", "channels-last", "tokens", "flat"]

_NAMES = [
    "relu",
    "relu_",
    "relu6",
    "gelu",
    "silu",
    "silu_",
    "elu",
    "elu_",
    "celu",
    "celu_",
    "selu",
    "selu_",
    "leaky_relu",
    "leaky_relu_",
    "prelu",
    "rrelu",
    "rrelu_",
    "mish",
    "mish_",
    "hardswish",
    "hardswish_",
    "hardtanh",
    "hardtanh_",
    "softplus",
    "softsign",
    "tanh",
    "tanh_",
    "tanhshrink",
    "logsigmoid",
    "threshold",
    "threshold_",
]
ACTIVATION_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    function
    for namespace in (F, torch, torch.Tensor, torch._C._nn)
    for name in _NAMES
    if callable(function := getattr(namespace, name, None))
)
"""Every spelling of an activation as a function. Sigmoid is left out: alone it is a gate, or the inside of a Swish."""

# Leaf modules that need no test: linear, or mixing positions.
_NEVER_ACTIVATIONS = (
    nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.Dropout,
    nn.modules.dropout._DropoutNd, nn.Identity, nn.Flatten, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.MaxPool2d, nn.Softmax,
    nn.Embedding, nn.Upsample,
)  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One place where an activation receives its input.

    ``name`` is the module path, with the call's index where a module or function is called more than once
    (``layer1.0.relu#1``). ``shape`` is that of the input without the batch axis. ``call`` counts the calls of this module,
    ``ordinal`` all functional activation calls of the forward pass (-1 for a module). ``index`` is the place in the list
    of all sites, gates included.
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


def find_sites(model: nn.Module, images: Tensor) -> list[Site]:
    """All sites of ``model`` in call order, gates included and marked; ``images`` (batch, channels, height, width).

    The model is run twice, on ``images`` and on their mirror image, in eval mode; it is left as it was. Raises SiteError
    if its forward fails, if it has no activation, or if the two runs disagree.
    """
    model = unwrap(model)
    was_training = model.training
    model.eval()
    try:
        sites, mirrored = _trace(model, images), _trace(model, images.flip(-1))
    finally:
        model.train(was_training)
    if sites != mirrored:
        raise SiteError(
            f"the sites depend on the input: {len(sites)} activations on one batch, {len(mirrored)} on another, or in "
            "another order",
            hint="such a model has no fixed place to put the operator",
        )
    if not sites:
        raise SiteError(
            "no activation was found in this model", hint="MeanSparse needs at least one non-linear activation"
        )
    return sites


def without_gates(sites: Sequence[Site]) -> list[Site]:
    """The sites used by default: squeeze-and-excitation and other gates left out."""
    return [site for site in sites if not site.gate]


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside ``DataParallel`` or ``torch.compile``: sites are named by its own module paths."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def operand(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that an activation function is applied to."""
    return args[0] if args else kwargs["input"]


def writes_in_place(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call of an activation function overwrites its input."""
    return (
        func.__name__.endswith("_") or kwargs.get("inplace") is True or (func is F.relu and len(args) > 1 and args[1])
    )


@dataclass
class _Frame:
    """A module call on the stack; spatial extents tell a gate from the block it scales."""

    path: str
    module: nn.Module
    call: int
    spatial_in: int
    spatial_out: int = 0
    clone: Tensor | None = None
    sites_before: int = 0
    axis: int | None = None


@dataclass
class _Found:
    """A site before its final numbering, with the module calls around it."""

    site: Site
    spatial: int
    enclosing: list[_Frame] = field(default_factory=list)


class _Tracer(TorchFunctionMode):
    """Follows one forward pass: who calls what, and along which axis the channels lie."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[_Frame] = []
        self.found: list[_Found] = []
        self.calls: dict[str, int] = {}
        self.is_activation: dict[str, bool] = {}
        self.ordinal = 0
        self.paused = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func in ACTIVATION_FUNCTIONS and self.stack:
            frame, x = self.stack[-1], operand(args, kwargs)
            name = getattr(func, "__name__", "activation")
            self._record(frame.path, "function", name, x, self.stack[:], call=0, ordinal=self.ordinal)
            self.ordinal += 1
        axis = _axis_after(func, args, kwargs, None)  # read before the call: an in-place one keeps its tensor
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            axis = _axis_after(func, args, kwargs, result)
            if axis is not None:
                result._channel_axis = axis  # type: ignore[attr-defined]
        elif isinstance(result, tuple | list) and args and isinstance(args[0], Tensor):
            for part in result:  # chunk, split, unbind
                if isinstance(part, Tensor) and part.ndim == args[0].ndim and (a := _axis(args[0])) is not None:
                    part._channel_axis = a  # type: ignore[attr-defined]
        return result

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.paused:
            return
        call = self.calls.get(path, 0)
        self.calls[path] = call + 1
        x = args[0] if args and isinstance(args[0], Tensor) else None
        frame = _Frame(path, module, call, _spatial(x), sites_before=len(self.found))
        if x is not None:
            frame.axis = _axis(x)
            if self._may_be_activation(module, x):
                frame.clone = x.detach().clone()
        self.stack.append(frame)

    def leave(self, path: str, module: nn.Module, output: Any) -> None:
        if self.paused:
            return
        frame = self.stack.pop()
        if not isinstance(output, Tensor):
            return
        if frame.clone is not None and output.shape == frame.clone.shape:
            if getattr(output, "_channel_axis", None) is None and frame.axis is not None:
                output._channel_axis = frame.axis  # type: ignore[attr-defined]
            if self._acts(frame):
                # The functional calls inside belong to this module: one site, not two.
                del self.found[frame.sites_before :]
                x = frame.clone
                x._channel_axis = frame.axis  # type: ignore[attr-defined]
                enclosing = self.stack[:]
                self._record(path, "module", type(module).__name__, x, enclosing, call=frame.call, ordinal=-1)
        frame.spatial_out = _spatial(output)
        frame.clone = None

    def _may_be_activation(self, module: nn.Module, x: Tensor) -> bool:
        return x.is_floating_point() and not isinstance(module, _NEVER_ACTIVATIONS) and not any(module.children())

    def _acts(self, frame: _Frame) -> bool:
        if frame.path not in self.is_activation:
            self.paused = True
            try:
                self.is_activation[frame.path] = is_elementwise_nonlinear(frame.module, frame.clone)  # type: ignore[arg-type]
            finally:
                self.paused = False
        return self.is_activation[frame.path]

    def _record(
        self, path: str, kind: Any, operation: str, x: Tensor, enclosing: list[_Frame], *, call: int, ordinal: int
    ) -> None:
        axis = _axis(x)
        if axis is None:
            axis = {3: 2}.get(x.ndim, 1)  # tokens are (batch, position, channel); all else channels-first
        axis = min(axis, x.ndim - 1)
        site = Site(
            index=-1, name=path, path=path, kind=kind, operation=operation, layout=_layout(x.ndim, axis),
            channel_axis=axis, channels=x.shape[axis], shape=tuple(x.shape[1:]), gate=False, call=call, ordinal=ordinal,
        )  # fmt: skip
        self.found.append(_Found(site, _spatial(x, axis), enclosing))


def is_elementwise_nonlinear(module: nn.Module, x: Tensor) -> bool:
    """Whether each output element depends on its own input element alone, and not linearly.

    ``x`` is one input the module really received; its shape must equal the output's.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator).to(x)
    scale = x.std().clamp_min(1e-3) if x.numel() > 1 else torch.ones_like(x)
    chosen = (torch.rand(x.shape, generator=generator) < 0.5).to(x.device)
    with torch.no_grad():
        try:
            here = module(x.clone())
            elsewhere = module(torch.where(chosen, x + noise * scale, x))
            if here.shape != x.shape or not torch.equal(here[~chosen], elsewhere[~chosen]):
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


def _trace(model: nn.Module, images: Tensor) -> list[Site]:
    tracer, handles = _Tracer(), []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, args, path=path: tracer.enter(path, m, args)))
        handles.append(module.register_forward_hook(lambda m, args, out, path=path: tracer.leave(path, m, out)))
    try:
        with torch.no_grad(), tracer:
            model(images)
    except SiteError:
        raise
    except Exception as error:
        where = f" in {tracer.stack[-1].path or 'the model'}" if tracer.stack else ""
        raise SiteError(
            f"the model's forward pass failed{where} on images of shape {tuple(images.shape)}: {error}",
            hint="does the data set's image size fit this model?",
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return _number(tracer)


def _number(tracer: _Tracer) -> list[Site]:
    totals: dict[str, int] = {}
    for found in tracer.found:
        totals[found.site.path] = totals.get(found.site.path, 0) + 1
    seen: dict[str, int] = {}
    sites = []
    for index, found in enumerate(tracer.found):
        site, path = found.site, found.site.path
        nth = seen.get(path, 0)
        seen[path] = nth + 1
        # A gate scales the block around it: no spatial extent here, while a module call around it has one on both ends.
        gate = found.spatial == 1 and any(f.spatial_in > 1 and f.spatial_out > 1 for f in found.enclosing)
        name = path or "(model)"
        sites.append(
            replace(
                site,
                index=index,
                name=f"{name}#{nth}" if totals[path] > 1 else name,
                gate=gate,
                n_calls=tracer.calls[path] if site.kind == "module" else 1,
            )
        )
    return sites


def _axis(x: Tensor) -> int | None:
    return getattr(x, "_channel_axis", None)


def _spatial(x: Tensor | None, axis: int | None = None) -> int:
    """Positions per channel: 1 where there is no spatial extent, 0 where there is no batch of features at all."""
    if x is None or x.ndim < 2:
        return 0
    axis = axis if axis is not None else _axis(x)
    if axis is None:
        axis = {3: 2}.get(x.ndim, 1)
    return x.numel() // max(1, x.shape[0] * x.shape[min(axis, x.ndim - 1)])


def _layout(ndim: int, axis: int) -> Layout:
    if ndim == 2:
        return "flat"
    if axis == ndim - 1:
        return "tokens" if ndim == 3 else "channels-last"
    return "channels-first"


_CHANNELS_FIRST = ("conv", "batch_norm", "group_norm", "instance_norm", "pixel_shuffle", "interpolate")


def _axis_after(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor | None
) -> int | None:
    """The channel axis of ``out`` = func(*args), or None where nothing is known."""
    if out is None or out.ndim < 2:
        return None
    name = getattr(func, "__name__", "")
    if any(word in name for word in _CHANNELS_FIRST):
        return 1
    if name in ("linear", "layer_norm", "rms_norm", "matmul", "__matmul__", "bmm", "scaled_dot_product_attention"):
        return out.ndim - 1
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    if name == "cat" and args and isinstance(args[0], tuple | list):
        tensors = [a for a in args[0] if isinstance(a, Tensor)]
    known = [(t, a) for t in tensors if (a := _axis(t)) is not None]
    if not known:
        return None
    source, axis = max(known, key=lambda pair: pair[0].numel())
    if name in ("permute", "transpose", "swapaxes", "movedim"):
        return _axis_after_permutation(name, args, kwargs, source, axis)
    if out.ndim == source.ndim and (out.shape[axis] == source.shape[axis] or name in ("cat", "pad", "__getitem__")):
        return axis
    if axis == source.ndim - 1 and out.shape[-1] == source.shape[-1]:
        return out.ndim - 1
    if axis < out.ndim and out.shape[axis] == source.shape[axis]:
        return axis
    return None


def _axis_after_permutation(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], source: Tensor, axis: int
) -> int | None:
    """Where the channel axis went: the permutation is asked itself, on an index tensor with one axis told apart."""
    probe = torch.empty([2 if i == axis else 1 for i in range(source.ndim)])
    moved = getattr(probe, name)(*args[1:], **{k: v for k, v in kwargs.items() if k != "input"})
    return list(moved.shape).index(2)
