"""Operators changed for a while: another alpha, another derivative, or off. One context for each.

All are undone on leaving, also after an exception, and may stand inside each other.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .function import parse_backward_rule
from .insertion import SparsifiedModel
from .module import Operator, check_alpha


def set_alpha(model: nn.Module, alpha: float) -> None:
    """Give every operator in ``model`` the same alpha, for good."""
    check_alpha(alpha)
    for operator in operators_of(model):
        operator.set_alpha(alpha)


def alpha_set(model: nn.Module, alpha: float | Tensor) -> AbstractContextManager[None]:
    """One alpha everywhere; or one for each site, (n_sites,), in the order of ``model.sites``."""
    if isinstance(alpha, Tensor):
        values, operators = alpha.tolist(), _by_site(cast(SparsifiedModel, model))
    else:
        operators = operators_of(model)
        values = [alpha] * len(operators)
    for value in values:
        check_alpha(value)
    return _changed(operators, "shared_alpha", values)


def example_alphas_set(model: SparsifiedModel, alphas: Tensor) -> AbstractContextManager[None]:
    """An alpha for each example of the next batches: one batch then serves many.

    ``alphas`` (n,) for one alpha an example, or (n, n_sites) for one an example and site, in the order of
    ``model.sites``; n is the number of images of each batch shown meanwhile. A row of zeros is the base model, bit by
    bit.
    """
    is_known = alphas.device.type == "cpu"  # a GPU would have to be waited for, in every forward pass
    if alphas.ndim not in (1, 2) or (is_known and not bool(((alphas >= 0) & torch.isfinite(alphas)).all())):
        raise ConfigError(f"alphas of shape {tuple(alphas.shape)} between {alphas.min():g} and {alphas.max():g}")
    columns = alphas.unsqueeze(1).expand(-1, len(model.sites)) if alphas.ndim == 1 else alphas
    if columns.shape[1] != len(model.sites):
        raise ConfigError(f"{columns.shape[1]} alphas an example for {len(model.sites)} sites")
    operators = _by_site(model)
    values = [column.to(operator.alpha) for column, operator in zip(columns.unbind(1), operators, strict=True)]
    return _changed(operators, "example_alphas", values)


def backward_rule(model: nn.Module, rule: str) -> AbstractContextManager[None]:
    """Another derivative of every operator; the forward pass is unchanged, bit by bit.

    ``rule`` as in ``parse_backward_rule``. A gradient through the base model instead takes two forward passes:
    ``operators_off``.
    """
    operators = operators_of(model)
    return _changed(operators, "rule", [parse_backward_rule(rule)] * len(operators))


def progress_set(model: nn.Module, progress: Tensor) -> AbstractContextManager[None]:
    """How far the search of each image of the next batch has come, (n,) from 0 to 1, for a band that narrows."""
    operators = [operator for operator in operators_of(model) if operator.rule.last is not None]
    return _changed(operators, "example_progress", [progress] * len(operators))


def operators_off(model: nn.Module) -> AbstractContextManager[None]:
    """The base model, whatever alpha is; touches no tensor, so it may surround a single forward pass."""
    operators = operators_of(model)
    return _changed(operators, "is_off", [True] * len(operators))


def operators_of(model: nn.Module) -> list[Operator]:
    """Every operator in ``model``, in the order of its modules."""
    return [module for module in model.modules() if isinstance(module, Operator)]


def _by_site(model: SparsifiedModel) -> list[Operator]:
    return [cast(Operator, model.at(site)) for site in model.sites]


@contextmanager
def _changed(operators: Sequence[Operator], name: str, values: Iterable[Any]) -> Iterator[None]:
    """The attribute ``name`` of each operator at a value of its own; afterwards each has its own back."""
    before = [getattr(operator, name) for operator in operators]
    try:
        for operator, value in zip(operators, values, strict=True):
            setattr(operator, name, value)
        yield
    finally:
        for operator, value in zip(operators, before, strict=True):
            setattr(operator, name, value)
