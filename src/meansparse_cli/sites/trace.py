"""Follows one forward pass: which activations are called, by whom, and where their inputs come from.

Module calls are seen by hooks, function calls by a ``TorchFunctionMode``; a stack of module calls says whose they are.
"""

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import MeanSparseError, SiteError
from .activations import ACTIVATION_FUNCTIONS, is_elementwise_nonlinear, may_be_activation, operand
from .channels import axes_after_moving, axis_after, axis_or_default, positions
from .foreign import Registered, Underneath, forward_failed
from .residual import Provenance, ResidualPaths

_UNKNOWN = Provenance()


@dataclass
class ModuleCall:
    path: str
    module: nn.Module
    call: int
    came: Provenance
    shape: tuple[int, ...]
    activations_before: int
    unseen_before: int
    clone: Tensor | None = None


@dataclass
class ActivationCall:
    """An activation that received ``shape``, batch included; ``positions`` are those of one channel of one image."""

    path: str
    kind: Literal["module", "function"]
    operation: str
    shape: tuple[int, ...]
    axis: int
    positions: int
    came: Provenance
    bit: int
    call: int
    ordinal: int


class Tracer(TorchFunctionMode):
    """One forward pass: ``found`` in call order, ``calls`` of each module, ``paths`` around residual additions.

    ``unseen``: (module path, operation) of what was computed from features by code that no function call shows, as
    scripted, traced and exported code is.
    """

    def __init__(self, model: nn.Module, is_activation: dict[str, bool]) -> None:
        super().__init__()
        self.found: list[ActivationCall] = []
        self.unseen: list[tuple[str, str]] = []
        self.calls: dict[str, int] = {}
        self.paths = ResidualPaths()
        self.stack: list[ModuleCall] = []
        self._ordinal = 0
        self._activated: Tensor | None = None
        self._is_activation = is_activation
        self._paused = self._in_call = False
        self._provenance = WeakTensorKeyDictionary()
        self._registered = Registered(model)

    def begin(self, images: Tensor) -> None:
        self._provenance[images] = Provenance(1, ancestors=1)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._paused:
            return func(*args, **kwargs or {})
        self._in_call = True
        try:
            return self._follow(func, args, kwargs or {})
        finally:
            self._in_call = False

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        site = None
        if func in ACTIVATION_FUNCTIONS and self.stack:
            name, ordinal = getattr(func, "__name__", "activation"), self._ordinal
            site = self._record(self.stack[-1].path, "function", name, operand(args, kwargs), call=0, ordinal=ordinal)
            self._ordinal += 1
        tensors = _tensors_in((*args, *kwargs.values()))
        for x in tensors:
            self._registered.check(x, self.here())
        sources = [(x, self._of(x)) for x in tensors]
        known = [(tuple(x.shape), p.axis) for x, p in sources if p.axis is not None]
        operands = [(p, _distinct(x)) for x, p in sources]
        first = self._of(args[0]) if args and isinstance(args[0], Tensor) else _UNKNOWN
        first_shape = tuple(args[0].shape) if first.axis is not None else ()
        result = func(*args, **kwargs)
        results = [result] if isinstance(result, Tensor) else result if isinstance(result, tuple | list) else ()
        outs = [x for x in results if isinstance(x, Tensor)]
        if not outs:
            return result
        moved = None if first.axis is None else axes_after_moving(func, args, kwargs, first_shape, first.axis)
        ancestors, is_sum = self.paths.ancestry_after(func, operands)
        if site is not None:
            ancestors |= site.bit
            self._activated = outs[0]
        for i, out in enumerate(outs):
            axis = axis_after(func, out, known, first.axis) if moved is None else moved[i]
            if axis is not None or ancestors:
                self._provenance[out] = Provenance(axis, ancestors, is_sum)
        return result

    def see(self, func: Any, args: tuple[Any, ...]) -> None:
        """PyTorch computes something: does the function call that led there show it?"""
        name = func.__name__.split(".")[0]
        if self._paused or self._in_call or name in ("detach", "alias", "lift_fresh"):
            return
        if any(self._of(x).ancestors for x in _tensors_in(args)):
            self.unseen.append((self.here(), name))

    def here(self) -> str:
        """The path of the module that is running."""
        return (self.stack[-1].path if self.stack else "") or "(model)"

    def look_at(self, module: nn.Module) -> None:
        """Any module is called, one of the model or not."""
        if not self._paused:
            self._registered.check(module, self.here())

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._paused:
            return
        with self._pause():
            call = self.calls.get(path, 0)
            self.calls[path] = call + 1
            x = args[0] if args and isinstance(args[0], Tensor) else None
            came = _UNKNOWN if x is None else self._of(x)
            shape = () if x is None else tuple(x.shape)
            frame = ModuleCall(path, module, call, came, shape, len(self.found), len(self.unseen))
            # a scripted activation is one too, but no operator can be put there
            is_open = not isinstance(module, torch.jit.ScriptModule)
            if x is not None and path and is_open and may_be_activation(module, x):
                frame.clone = x.detach().clone()
            self.stack.append(frame)

    def leave(self, path: str, module: nn.Module, output: Any) -> None:
        if self._paused:
            return
        with self._pause():
            frame = self.stack.pop()
            if not isinstance(output, Tensor):
                return
            x, came = frame.clone, frame.came
            # a module that only hands on what an activation module of its own made is not the activation
            is_wrapper = any(module.children()) and output is self._activated
            if x is not None and output.shape == x.shape and not is_wrapper and self._acts(frame, x):
                # The calls inside belong to this module: one site, not two.
                del self.found[frame.activations_before :]
                del self.unseen[frame.unseen_before :]
                self._provenance[x] = came
                site = self._record(path, "module", type(module).__name__, x, call=frame.call, ordinal=-1)
                self._provenance[output] = Provenance(came.axis, came.ancestors | site.bit)
                self._activated = output
            elif came.ancestors and not self._of(output).ancestors:
                # a custom autograd function hides what it computes from
                axis = came.axis if output.shape == frame.shape else None
                self._provenance[output] = Provenance(axis, came.ancestors | self.paths.new_bit())

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        """What the tracer itself computes is no part of the model."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def _of(self, x: Tensor) -> Provenance:
        return self._provenance.get(x, _UNKNOWN)  # type: ignore[no-any-return]

    def _acts(self, frame: ModuleCall, x: Tensor) -> bool:
        # torch's own modules without parameters are what they print; any other module is asked itself
        is_plain = type(frame.module).__module__.startswith("torch.nn.modules.") and not frame.module._parameters
        key = repr(frame.module) if is_plain else f"module {frame.path}"
        if key not in self._is_activation:
            self._is_activation[key] = is_elementwise_nonlinear(frame.module, x)
        return self._is_activation[key]

    def _record(self, path: str, kind: Any, operation: str, x: Tensor, *, call: int, ordinal: int) -> ActivationCall:
        came, shape = self._of(x), tuple(x.shape)
        axis = axis_or_default(came.axis, x.ndim)
        n_positions, bit = positions(shape, axis), self.paths.new_bit()
        found = ActivationCall(path, kind, operation, shape, axis, n_positions, came, bit, call, ordinal)
        self.found.append(found)
        return found


def trace(model: nn.Module, images: Tensor, is_activation: dict[str, bool]) -> Tracer:
    """Run ``model`` once on ``images``, eagerly; ``is_activation``: what earlier runs found out about its modules."""
    tracer, handles = Tracer(model, is_activation), []
    images = images.clone()
    handles.append(nn.modules.module.register_module_forward_pre_hook(lambda module, args: tracer.look_at(module)))
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.RecursiveScriptModule):
            continue  # takes no hooks
        handles.append(module.register_forward_pre_hook(lambda m, args, path=path: tracer.enter(path, m, args)))
        handles.append(module.register_forward_hook(lambda m, args, out, path=path: tracer.leave(path, m, out)))
    try:
        with torch.no_grad(), _eagerly(), tracer, Underneath(tracer.see), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*global hooks on modules")  # they see a compiled part twice: no harm
            tracer.begin(images)
            model(images)
    except MeanSparseError:
        raise
    except torch.OutOfMemoryError as error:
        raise SiteError("out of memory while the sites were looked for", hint="use --device cpu") from error
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        where = f"in {tracer.here()} on images of shape {tuple(images.shape)}"
        raise forward_failed(error, where) from error
    finally:
        for handle in handles:
            handle.remove()
    return tracer


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Compiled parts run as they were written; without dynamo, which is slow to import, there are none."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _distinct(x: Tensor) -> int:
    """Elements that are not copies of each other by ``expand``."""
    return math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride) if x.numel() else 0


def _tensors_in(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):  # cat and stack take a list
            found += [x for x in value if isinstance(x, Tensor)]
    return found
