"""Puts a module in front of each of a model's activations, and takes it out again.

No model source is edited. A site that is a module gets its operator as a child called ``mean_sparse`` and a forward
pre-hook that applies it; a site that is a function call (``F.relu`` inside a block) is reached by a
``TorchFunctionMode`` around the forward pass. Both are properties of the modules themselves, so ``deepcopy``,
``state_dict``, ``DataParallel`` and ``torch.compile`` go on working.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import MeanSparseError, SiteError
from ..sites.activations import ACTIVATION_FUNCTIONS, operand, writes_in_place
from ..sites.find import Site, unwrap
from ..sites.foreign import forward_failed

CHILD_NAME = "mean_sparse"


class CallSequence(nn.Module):
    """One operator a call, for an activation module that a forward pass calls more than once."""

    def __init__(self, n_calls: int) -> None:
        super().__init__()
        self.operators = nn.ModuleDict()
        self.n_calls = n_calls
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        call = self.calls
        self.calls += 1
        if call >= self.n_calls:
            raise SiteError(
                f"an activation was called {call + 1} times in one forward pass, "
                f"{self.n_calls} calls were found before",
                hint="the sites of this model depend on its input",
            )
        key = str(call)
        return self.operators[key](x) if key in self.operators else x


def _apply_at_module(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # The operator is looked up on the module at hand, not closed over: replicas and copies have their own.
    x = args[0]
    out = module.get_submodule(CHILD_NAME)(x)
    if out is not x and getattr(module, "inplace", False):
        # an in-place activation changes its argument, and somebody may read it afterwards
        out = x.copy_(out)
    return (out, *args[1:])


class _FunctionSites(TorchFunctionMode):
    """Applies an operator to the k-th activation call of a forward pass, for every k that has one."""

    def __init__(self, operators: nn.ModuleDict) -> None:
        super().__init__()
        self.operators, self.ordinal = operators, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ACTIVATION_FUNCTIONS:
            key = str(self.ordinal)
            self.ordinal += 1
            if key in self.operators:
                x = operand(args, kwargs)
                out = self.operators[key](x)
                if out is not x and writes_in_place(func, args, kwargs):
                    out = x.copy_(out)
                if args:
                    args = (out, *args[1:])
                else:
                    kwargs = kwargs | {"input": out}
        return func(*args, **kwargs)


class SparsifiedModel(nn.Module):
    """A model with one module (a ``MeanSparse``, or an observer) at each site. ``base`` is the model itself.

    Built by ``insert``; ``remove`` gives ``base`` back untouched.
    """

    def __init__(self, base: nn.Module, sites: Sequence[Site]) -> None:
        super().__init__()
        self.base = base
        self.sites = tuple(sites)
        self.function_operators = nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        for module in self._call_sequences():
            module.calls = 0
        try:
            if not self.function_operators:
                return self.base(x)
            return (_never_traced if "torch._dynamo" in sys.modules else _with_functions)(self, x)
        except (MeanSparseError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise forward_failed(error, f"on images of shape {tuple(x.shape)}") from error

    def _call_sequences(self) -> list[CallSequence]:
        if not any(site.n_calls > 1 and site.kind == "module" for site in self.sites):
            return []
        return [module for module in self.base.modules() if isinstance(module, CallSequence)]

    def at(self, site: Site) -> nn.Module:
        """The module that was put at a site."""
        if site.kind == "function":
            return self.function_operators[str(site.ordinal)]
        child = self.base.get_submodule(site.path).get_submodule(CHILD_NAME)
        return child.operators[str(site.call)] if isinstance(child, CallSequence) else child


def _with_functions(model: SparsifiedModel, x: Tensor) -> Tensor:
    with _FunctionSites(model.function_operators):
        return model.base(x)


_never_traced = torch._disable_dynamo(_with_functions)
"""Where something may be compiled: a tracer numbers function calls in its own way. Not ``torch.compiler.disable``,
which loads dynamo here and now and would double the time that every command takes to start.
"""


def insert(model: nn.Module, sites: Sequence[Site], modules: Sequence[nn.Module]) -> SparsifiedModel:
    """Put ``modules[i]`` in front of the activation at ``sites[i]``; all is checked before the model is touched."""
    model = unwrap(model)
    if not sites:
        raise SiteError("no site was chosen", hint="`meansparse sites` lists the sites of a model")
    if len(sites) != len(modules):
        raise SiteError(f"{len(modules)} modules for {len(sites)} sites")
    paths = dict(model.named_modules())
    for site in sites:
        if site.kind == "module" and site.path not in paths:
            raise SiteError(f"the model has no module {site.path!r}", hint="these sites belong to another model")
        if site.kind == "module" and hasattr(paths[site.path], CHILD_NAME):
            raise SiteError(f"{site.path} already has an operator", hint="remove it first: remove(model)")
    wrapper = SparsifiedModel(model, sites)
    for site, module in zip(sites, modules, strict=True):
        if site.kind == "function":
            wrapper.function_operators[str(site.ordinal)] = module
            continue
        target = paths[site.path]
        if site.n_calls == 1:
            target.add_module(CHILD_NAME, module)
        else:
            if not hasattr(target, CHILD_NAME):
                target.add_module(CHILD_NAME, CallSequence(site.n_calls))
            target.get_submodule(CHILD_NAME).operators[str(site.call)] = module
        if _apply_at_module not in target._forward_pre_hooks.values():
            target.register_forward_pre_hook(_apply_at_module)
    _forget_compiled_code()
    wrapper.training = model.training  # its own flag alone: the modules of a model may be in different modes
    return wrapper


def remove(model: SparsifiedModel) -> nn.Module:
    """Take every operator out again and return the base model, the same object that went in."""
    for module in list(model.base.modules()):
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _apply_at_module:
                del module._forward_pre_hooks[key]
                delattr(module, CHILD_NAME)
    model.function_operators = nn.ModuleDict()
    _forget_compiled_code()
    return model.base


def _forget_compiled_code() -> None:
    """Parts of a model that were compiled and run before do not look for new hooks: they have to be compiled again."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
