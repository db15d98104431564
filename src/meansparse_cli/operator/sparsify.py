"""The MeanSparse operator, the module that holds it, and putting it in front of a model's activations.

out = mean where abs(in - mean) <= alpha * std, else in (paper, section 3; per channel, element-wise). The gradient is
zero inside the band and one outside. BPDA attacks (Athalye et al. 2018) put another derivative in its place while the
forward pass stays as it is: ``backward_rule``.

No model source is edited. A site that is a module gets its operator as a child called ``mean_sparse`` and a forward
pre-hook that applies it; a site that is a function call (``F.relu`` inside a block) is reached by a
``TorchFunctionMode`` around the forward pass. Both are properties of the modules themselves, so ``deepcopy``,
``state_dict``, ``DataParallel`` and ``torch.compile`` go on working.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ConfigError, SiteError
from ..sites.find import ACTIVATION_FUNCTIONS, Site, operand, unwrap, writes_in_place

CHILD_NAME = "mean_sparse"


class _ReplacedGradient(torch.autograd.Function):
    """The operator forward; backward the gradient times ``slope``, or the gradient itself where that is None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, mask: Tensor, slope: Tensor | None) -> Tensor:
        ctx.has_slope = slope is not None
        if slope is not None:
            ctx.save_for_backward(slope)
        return _replaced(x, mean, mask)  # a tensor of its own: an in-place activation may follow

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return (grads[0] * ctx.saved_tensors[0] if ctx.has_slope else grads[0]), None, None, None


def mean_sparsify(
    x: Tensor, mean: Tensor, threshold: Tensor, *, straight_through: bool = False, soft_edge: Tensor | None = None
) -> Tensor:
    """Replace by ``mean`` what lies within ``threshold`` of it (paper, equation for a_out).

    ``mean`` and ``threshold`` (in activation units) broadcast against ``x``, of any shape. NaN stays NaN, infinity may
    become NaN. The values are the same whatever the gradient: that of the operator, one everywhere with
    ``straight_through``, or that of a band whose edge is a sigmoid of width ``soft_edge``, in activation units.

    >>> mean_sparsify(torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor(0.5), torch.tensor(0.2))
    tensor([0.2000, 0.5000, 0.5000, 0.8000])
    """
    mean = mean.to(x.dtype)
    with torch.no_grad():  # only the mask is kept for the backward pass
        mask = _mask(x, mean, threshold)
        slope = None if soft_edge is None or straight_through else _soft_slope(x, mean, threshold, soft_edge)
    if straight_through or slope is not None:
        replaced: Tensor = _ReplacedGradient.apply(x, mean, mask, slope)
        return replaced
    return _replaced(x, mean, mask)


def _mask(x: Tensor, mean: Tensor, threshold: Tensor) -> Tensor:
    """Bool, true where the mean comes in; on a CPU a number, 0 there and 1 elsewhere, in the type of ``x``.

    PyTorch's comparisons and choices with bool are not vectorised on a CPU: an operator so made takes a sixth of the time.
    """
    distance = (x - mean).abs_()
    return distance.gt_(threshold) if x.device.type == "cpu" else distance <= threshold


def _replaced(x: Tensor, mean: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, mean, x) if mask.dtype == torch.bool else torch.lerp(mean, x, mask)  # exact at 0 and 1


def _soft_slope(x: Tensor, mean: Tensor, threshold: Tensor, edge: Tensor) -> Tensor:
    """The derivative of mean + (x - mean) * sigmoid((|x - mean| - threshold) / edge), in the type of ``x``.

    One where the threshold is below zero, which is how an alpha of 0 is written beside others.
    """
    distance = (x.float() - mean.float()).abs()
    edge = edge.float().clamp(min=torch.finfo(torch.float32).tiny ** 0.5)  # a channel may have a deviation of zero
    gate = torch.sigmoid((distance - threshold) / edge)
    slope = gate + distance * (gate * (1 - gate)) / edge
    return torch.where(threshold < 0, 1.0, slope).to(x.dtype)


@dataclass(frozen=True)
class BackwardRule:
    """What a gradient meets at the operator: ``true``, ``identity``, or ``soft`` with a ``temperature`` in std."""

    name: str
    temperature: float | None = None


TRUE_GRADIENT, IDENTITY = BackwardRule("true"), BackwardRule("identity")


def parse_backward_rule(text: str) -> BackwardRule:
    """``true``, ``identity`` or ``soft:T``, T > 0 the width of the band's sigmoid edge in standard deviations."""
    if text in (TRUE_GRADIENT.name, IDENTITY.name):
        return BackwardRule(text)
    name, _, number = text.partition(":")
    try:
        temperature = float(number)
    except ValueError:
        temperature = 0.0
    if name != "soft" or not 0 < temperature < float("inf"):
        raise ConfigError(f"backward rule {text!r} is not known", hint="true, identity, or soft:T such as soft:0.1")
    return BackwardRule(name, temperature)


class MeanSparse(nn.Module):
    """The operator of one site: ``mean`` and ``std`` (channels,), ``alpha`` in standard deviations.

    ``channel_axis`` is the axis of its input that the statistics belong to. At alpha = 0 the input itself is returned,
    so that values *and* gradients are those of the base model, also in channels of zero variance.
    """

    mean: Tensor
    std: Tensor
    alpha: Tensor

    def __init__(self, mean: Tensor, std: Tensor, alpha: float = 0.0, channel_axis: int = 1) -> None:
        super().__init__()
        if mean.ndim != 1 or mean.shape != std.shape:
            raise ConfigError(f"mean and std must be of one shape (channels,), found {mean.shape} and {std.shape}")
        self.register_buffer("mean", mean.detach().to(torch.get_default_dtype()).clone())
        self.register_buffer("std", std.detach().to(torch.get_default_dtype()).clone())
        self.register_buffer("alpha", torch.zeros(()))
        self.channel_axis = channel_axis
        self.rule = TRUE_GRADIENT
        self.is_off = False
        self.example_alphas: Tensor | None = None
        self.set_alpha(alpha)

    def set_alpha(self, alpha: float) -> None:
        """Change alpha in place; refuses what is negative or not finite."""
        check_alpha(alpha)
        self.alpha.fill_(alpha)
        self._is_identity = alpha == 0

    def forward(self, x: Tensor) -> Tensor:
        if self.is_off or (self._is_identity and self.example_alphas is None):
            return x
        mean, threshold, std = self._at(x)
        if self.rule.temperature is None:
            return mean_sparsify(x, mean, threshold, straight_through=self.straight_through)
        return mean_sparsify(x, mean, threshold, soft_edge=self.rule.temperature * std)

    def _at(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, threshold and std in the shape that broadcasts against ``x``."""
        shape = [1] * x.ndim
        shape[self.channel_axis] = -1
        mean, std = self.mean.view(shape), self.std.view(shape)
        threshold = self.alpha * std if self.example_alphas is None else _thresholds(self.example_alphas, std, len(x))
        return mean, threshold, std

    def masked(self, x: Tensor) -> Tensor:
        """Bool, of the shape of ``x``: what the operator replaces by the mean; nothing at alpha = 0."""
        if self.is_off or (self._is_identity and self.example_alphas is None):
            return torch.zeros_like(x, dtype=torch.bool)
        mean, threshold, _ = self._at(x)
        return (x - mean.to(x.dtype)).abs() <= threshold

    @property
    def straight_through(self) -> bool:
        """Does a gradient pass as if the operator were not there?"""
        return self.rule == IDENTITY

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._is_identity = bool(self.alpha == 0)

    def extra_repr(self) -> str:
        return f"{self.mean.numel()} channels, alpha={float(self.alpha):g}"


def _thresholds(alphas: Tensor, std: Tensor, n_rows: int) -> Tensor:
    """One threshold an example and channel; below zero, so that nothing lies within it, where alpha is 0.

    Windowed transformers fold their windows into the batch axis, the windows of one image side by side.
    """
    if n_rows % len(alphas):
        raise SiteError(
            f"{len(alphas)} alphas for a batch axis of {n_rows}: this model's batch axis is not the images'"
        )
    rows = alphas.repeat_interleave(n_rows // len(alphas)).view(-1, *[1] * (std.ndim - 1))
    return torch.where(rows > 0, rows * std, -1.0)


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
                f"an activation was called {call + 1} times in one forward pass, {self.n_calls} calls were found before",
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
        if not self.function_operators:
            return self.base(x)
        return self._forward_with_functions(x)

    @torch.compiler.disable  # the tracer numbers function calls in its own way; module sites alone compile whole
    def _forward_with_functions(self, x: Tensor) -> Tensor:
        with _FunctionSites(self.function_operators):
            return self.base(x)

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


def insert(model: nn.Module, sites: Sequence[Site], modules: Sequence[nn.Module]) -> SparsifiedModel:
    """Put ``modules[i]`` in front of the activation at ``sites[i]``. Everything is checked before the model is touched."""
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


def check_alpha(alpha: float) -> None:
    """Refuse an alpha below 0 or not finite."""
    if not 0 <= alpha < float("inf"):
        raise ConfigError(
            f"alpha is {alpha}", hint="alpha is a number of standard deviations, 0 or above; the paper uses 0.05 to 0.5"
        )


def set_alpha(model: nn.Module, alpha: float) -> None:
    """Give every operator in ``model`` the same alpha."""
    check_alpha(alpha)
    for operator in _operators(model):
        operator.set_alpha(alpha)


@contextmanager
def alpha_set(model: nn.Module, alpha: float) -> Iterator[None]:
    """Set alpha everywhere for a while; each operator gets its own value back, also after an exception."""
    before = [(operator, float(operator.alpha)) for operator in _operators(model)]
    set_alpha(model, alpha)
    try:
        yield
    finally:
        for operator, value in before:
            operator.set_alpha(value)


@contextmanager
def site_alphas_set(model: SparsifiedModel, alphas: Tensor) -> Iterator[None]:
    """Give each site its own alpha for a while; ``alphas`` (n_sites,), in the order of ``model.sites``."""
    operators = [cast(MeanSparse, model.at(site)) for site in model.sites]
    before = [float(operator.alpha) for operator in operators]
    try:
        for operator, alpha in zip(operators, alphas.tolist(), strict=True):
            operator.set_alpha(alpha)
        yield
    finally:
        for operator, alpha in zip(operators, before, strict=True):
            operator.set_alpha(alpha)


@contextmanager
def example_alphas_set(model: SparsifiedModel, alphas: Tensor) -> Iterator[None]:
    """Give every example of the next batches an alpha of its own: one batch then serves many alphas.

    ``alphas`` (n,) for one alpha an example, or (n, n_sites) for one an example and site, in the order of
    ``model.sites``; n is the number of images of each batch shown meanwhile. A row of zeros is the base model, bit by bit.
    """
    if not bool(((alphas >= 0) & torch.isfinite(alphas)).all()) or alphas.ndim not in (1, 2):
        raise ConfigError(f"alphas of shape {tuple(alphas.shape)} between {alphas.min():g} and {alphas.max():g}")
    columns = alphas.unsqueeze(1).expand(-1, len(model.sites)) if alphas.ndim == 1 else alphas
    if columns.shape[1] != len(model.sites):
        raise ConfigError(f"{columns.shape[1]} alphas an example for {len(model.sites)} sites")
    operators = [cast(MeanSparse, model.at(site)) for site in model.sites]
    before = [operator.example_alphas for operator in operators]
    for i, operator in enumerate(operators):
        operator.example_alphas = columns[:, i].to(operator.std)
    try:
        yield
    finally:
        for operator, value in zip(operators, before, strict=True):
            operator.example_alphas = value


@contextmanager
def backward_rule(model: nn.Module, rule: str) -> Iterator[None]:
    """Replace the derivative of every operator for a while; the forward pass is unchanged, bit by bit.

    ``rule`` as in ``parse_backward_rule``. A gradient through the base model instead takes two forward passes:
    ``operators_off``.
    """
    parsed = parse_backward_rule(rule)
    operators = _operators(model)
    before = [operator.rule for operator in operators]
    for operator in operators:
        operator.rule = parsed
    try:
        yield
    finally:
        for operator, value in zip(operators, before, strict=True):
            operator.rule = value


def straight_through(model: nn.Module) -> AbstractContextManager[None]:
    """Back-propagate straight through every operator for a while (BPDA)."""
    return backward_rule(model, IDENTITY.name)


@contextmanager
def operators_off(model: nn.Module) -> Iterator[None]:
    """The base model for a while, whatever alpha is; touches no tensor, so it may surround a single forward pass."""
    operators = _operators(model)
    before = [operator.is_off for operator in operators]
    for operator in operators:
        operator.is_off = True
    try:
        yield
    finally:
        for operator, value in zip(operators, before, strict=True):
            operator.is_off = value


def _operators(model: nn.Module) -> list[MeanSparse]:
    return [module for module in model.modules() if isinstance(module, MeanSparse)]
