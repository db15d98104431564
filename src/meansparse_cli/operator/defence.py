"""Any module of a network as a defence: switched off, or differentiated in another way, like a MeanSparse operator.

What is asked of MeanSparse, whether a gain is left once the attacker back-propagates another way, is asked of every
defence with a kink, a quantiser or a sampling step (Athalye et al. 2018, BPDA and EOT). ``defend`` makes of a model one
whose alpha is 1 with the defence and 0 without it, so that the engine attacks both.
"""

import copy
import difflib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..errors import ConfigError, SiteError
from .function import TRUE_GRADIENT, with_gradient_of
from .insertion import CallSequence, SparsifiedModel
from .module import Operator

Surrogate = Callable[[Tensor], Tensor]
"""A module's input to something of the shape of its output, whose gradient an attack may follow instead."""


def OWN(x: Tensor) -> Tensor:  # noqa: N802
    """In a surrogate's place: the module's own gradient, whatever the backward rule. It is never called."""
    raise NotImplementedError


def SOFT(x: Tensor) -> Tensor:  # noqa: N802
    """In a surrogate's place: the module's slope across a narrow band, for steps and thresholds. It is never called."""
    raise NotImplementedError


BAND = 0.05
"""Half of that band, in standard deviations of an example's features, as the soft edge of ``soft-0.05``."""


class Choice(Operator):
    """``on`` at alpha 1, ``off`` at alpha 0; in one batch each example as its own alpha says."""

    def __init__(self, on: nn.Module, off: nn.Module) -> None:
        super().__init__(1.0)
        self.on, self.off = on, off

    def forward(self, x: Tensor) -> Tensor:
        if self._does_nothing:
            return self.off(x)  # type: ignore[no-any-return]
        out = self.defended(x)
        if self.example_alphas is None:
            return out
        rows = self._rows(self.example_alphas, len(x), out.ndim)
        return torch.where(rows > 0, out, self.off(x))

    def defended(self, x: Tensor) -> Tensor:
        """The output at alpha 1."""
        return self.on(x)  # type: ignore[no-any-return]


class Defence(Choice):
    """A module of a model. Backward rules other than ``true`` follow ``surrogate``, or the identity, in its place."""

    def __init__(self, name: str, on: nn.Module, surrogate: Surrogate | None) -> None:
        super().__init__(on, nn.Identity())
        self.name, self.surrogate = name, surrogate

    def defended(self, x: Tensor) -> Tensor:
        out = self.on(x)
        if not isinstance(out, Tensor) or len(out) != len(x):
            found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise SiteError(f"the defence {self.name} makes {found} of a batch of shape {tuple(x.shape)}")
        if self.rule == TRUE_GRADIENT or self.surrogate is OWN:
            # through a step or an argmax autograd has no way at all: that is a gradient of zero
            return out if out.requires_grad or not x.requires_grad else with_gradient_of(out, out + 0 * x.sum())
        instead = x if self.surrogate in (None, SOFT) else self.surrogate(x)  # type: ignore[misc]
        if instead.shape != out.shape:
            what = "its input" if self.surrogate is None else "its surrogate"
            raise SiteError(
                f"the defence {self.name} gives shape {tuple(out.shape)}, {what} {tuple(instead.shape)}",
                hint="name a surrogate: a function of its input that gives the shape of its output, and has a gradient",
            )
        return with_gradient_of(out, x * self.slope(x) if self.surrogate is SOFT and x.requires_grad else instead)

    def slope(self, x: Tensor) -> Tensor:
        """The central difference of a module that keeps the shape of ``x``, each feature as if it moved with all."""
        with torch.no_grad():
            half = BAND * x.flatten(1).std(dim=1).clamp_min(1e-12).view(-1, *[1] * (x.ndim - 1))
            return (self.on(x + half) - self.on(x - half)) / (2 * half)  # type: ignore[no-any-return]


class DefendedModel(SparsifiedModel):
    """A model with its defence at alpha 1, and without it at alpha 0. ``sites``: the names of what alpha switches."""

    may_fold = False
    """Where a defence stands between a convolution and a batch norm, folding them would leave it out."""

    def __init__(self, network: nn.Module, switched: Mapping[str, Choice], n_draws: int) -> None:
        super().__init__(network, ())
        self.sites, self.n_draws = tuple(switched), n_draws  # type: ignore[assignment, arg-type]

    def _call_sequences(self) -> list[CallSequence]:
        return []

    def at(self, site: object) -> nn.Module:
        return self.base.get_submodule(str(site))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, n_classes): of one pass, or the log of the mean of the probabilities of ``n_draws``."""
        if self.n_draws == 1:
            return super().forward(x)
        draws = [super(DefendedModel, self).forward(x).log_softmax(dim=1) for _ in range(self.n_draws)]
        return torch.logsumexp(torch.stack(draws), dim=0)


def defend(
    model: nn.Module, defence: Mapping[str, Surrogate | None], *, base: nn.Module | None = None, n_draws: int = 1
) -> DefendedModel:
    """A copy of ``model`` whose modules named by the patterns of ``defence`` are its defence.

    ``defence``: pattern (as ``blocks.*.quantise``) -> what to differentiate in such a module's place, None: identity;
    ``OWN`` and ``SOFT`` are those of the module itself.
    ``base``: the model without the defence; by default ``model`` with these modules replaced by identity. ``n_draws``:
    passes to average, for a defence that is random. Raises ConfigError for a pattern that matches no module, or one
    inside another's.
    """
    if base is None and not defence:
        raise ConfigError("no defence was named", hint="name its modules, or a base model to compare with")
    if n_draws < 1:
        raise ConfigError(f"{n_draws} draws; expected 1 or more")
    network, found = copy.deepcopy(model).eval(), dict[str, Choice]()
    for pattern, surrogate in defence.items():
        for name in _matching(network, pattern):
            found[name] = Defence(name, network.get_submodule(name), surrogate)
    if inner := [name for name in found if any(name.startswith(f"{other}.") for other in found)]:
        raise ConfigError(f"{inner[0]} is inside another module of the defence")
    for name, operator in found.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, operator)
    if base is None:
        return DefendedModel(network, found, n_draws).eval()
    choice = Choice(network, copy.deepcopy(base).eval())
    return DefendedModel(choice, {"": choice}, n_draws).eval()


def _matching(network: nn.Module, pattern: str) -> list[str]:
    names = [name for name, _ in network.named_modules(remove_duplicate=False) if name]
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        tensors = [name for name, _ in network.named_parameters()] + [name for name, _ in network.named_buffers()]
        nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
        what = "a tensor, not a module" if any(fnmatchcase(name, pattern) for name in tensors) else "no module"
        raise ConfigError(f"{pattern!r} matches {what} of the model", hint=f"it has {', '.join(nearest)}, ...")
    return found
