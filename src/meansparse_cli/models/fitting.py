"""Weights go where they fit: of all tensors in a checkpoint, whatever holds and names them, those that fill a network.

A set of tensors is known by the prefix that its names have in the file, containers included: ``state_dict_ema``,
``model._orig_mod``. It fits if it fills the network entirely, or the one part of it that has all its parameters, as
behind a normalisation of the factory's own.
"""

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .weights import CONTAINERS, state_dict_of

log = logging.getLogger(__name__)

CONSTANTS = ("mu", "sigma", "mean", "std", "normalize.mean", "normalize.std")
"""Normalisation buffers the architecture sets by itself; older checkpoints lack them."""
COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")
"""Of batch norms, averages and profilers: no output depends on them in eval mode."""
ACTING = ("weight", "bias", "running_mean", "running_var")
"""What a layer computes with: where the network's layer has none of that name, the file is of another network."""
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Words that ``DataParallel``, ``torch.compile`` and their like put into names, at any depth."""
AVERAGED = ("ema", "averag", "swa", "shadow", "polyak")
NOT_THE_MODEL = ("attacker", "adversary", "teacher", "optimizer", "proxy")


@dataclass(frozen=True)
class Fitted:
    """``taken``: where in the file the weights were; ``others``: where further, different ones are that fit as well."""

    taken: str
    others: tuple[str, ...]
    left_over: tuple[str, ...]


@dataclass(frozen=True)
class _Target:
    """A network, or the part of it that has all its parameters; ``names``: its tensors by how they are looked for."""

    module: nn.Module
    names: Mapping[str, str]

    def required(self) -> list[str]:
        return [k for k in self.names if k not in CONSTANTS and k.rpartition(".")[2] not in COUNTERS]


def fit_weights(
    module: nn.Module, checkpoint: Any, *, what: str, mend: str | None = None, key: str | None = None
) -> Fitted:
    """Copy a checkpoint's weights into ``module``; where several sets fit, that of ``key``, or the plain one.

    Raises CheckpointError, and leaves the module as it was, if nothing fits, or what fits are no finite numbers.
    """
    tensors = dict(_tensors_in(checkpoint))
    if not tensors:
        state_dict_of(checkpoint, what)  # says what there is instead
    nearest: list[tuple[int, str]] = []
    for target, found in _readings(module, tensors):
        problems = {p: _compare(target, found, p) for p in _prefixes(target, found)}
        nearest += [problem for problem in problems.values() if problem is not None]
        fits = sorted((p for p, problem in problems.items() if problem is None), key=_rank)
        chosen = fits if key is None else [p for p in fits if p.rstrip(".") == key]
        if fits and not chosen:
            listed = ", ".join(p.rstrip(".") or "(the file itself)" for p in fits)
            raise CheckpointError(f"{what}: nothing under {key!r} fits the network", hint=f"what fits: {listed}")
        if not chosen:
            continue
        sets = {p: {name: found[p + k] for k, name in target.names.items() if p + k in found} for p in fits}
        mine = sets.pop(chosen[0])
        _check_numbers(target.module, mine, what)
        target.module.load_state_dict(mine, strict=False)
        others = tuple(p.rstrip(".") for p, theirs in sets.items() if not _same(mine, theirs))
        of_sets = {id(t) for tensors_of in (mine, *sets.values()) for t in tensors_of.values()}
        left = tuple(k for k, t in found.items() if id(t) not in of_sets and k.rpartition(".")[2] not in COUNTERS)
        fitted = Fitted(chosen[0].rstrip("."), others, left)
        _say(fitted, what, is_asked=key is not None)
        return fitted
    words = min(nearest, key=lambda problem: problem[0], default=(0, "nothing to compare"))[1]
    raise CheckpointError(f"{what}: the weights are of another model: {words}", hint=mend)


def _tensors_in(held: Any, path: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by the way to it, through mappings, lists and modules, each of which is entered once on the way."""
    if isinstance(held, Tensor):
        yield path, held
        return
    if isinstance(held, nn.Module):
        held = held.state_dict()
    if id(held) in above or len(above) > 20:
        return
    parts = held.items() if isinstance(held, Mapping) else enumerate(held) if isinstance(held, list | tuple) else ()
    for name, part in parts:
        yield from _tensors_in(part, f"{path}.{name}" if path else str(name), (*above, id(held)))


def _readings(module: nn.Module, tensors: dict[str, Tensor]) -> Iterator[tuple[_Target, dict[str, Tensor]]]:
    """A part of the network, and the file's tensors under the names to look for: as they are, unwrapped, converted."""
    unwrapped: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        unwrapped.setdefault(_unwrapped(name), tensor)
    for part in _parts(module):
        names = list(part.state_dict())
        yield _Target(part, {name: name for name in names}), tensors
        bare = {_unwrapped(name): name for name in names}
        if len(bare) == len(names):
            yield _Target(part, bare), unwrapped
    for part in _parts(module):
        # timm renamed layers over the years, and each architecture's file knows how its old checkpoints read
        convert = getattr(sys.modules.get(type(part).__module__), "checkpoint_filter_fn", None)
        if convert is not None:
            inner = {_without_containers(k): v for k, v in unwrapped.items()}
            with contextlib.suppress(KeyError, AttributeError, IndexError, RuntimeError, TypeError, ValueError):
                yield _Target(part, {name: name for name in part.state_dict()}), dict(convert(inner, part))


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The network, then the one child that has all of its parameters, and so on."""
    yield module
    holders = [child for child in module.children() if any(True for _ in child.parameters())]
    if len(holders) == 1 and not any(p is not None for p in module._parameters.values()):
        yield from _parts(holders[0])


def _prefixes(target: _Target, tensors: Mapping[str, Tensor]) -> list[str]:
    """Where in the file the network's first tensors stand, ``""`` or with a dot at the end: where all do, and a few."""
    names = target.required()[:50]
    places = Counter(k.removesuffix(n) for n in names for k in tensors if k == n or k.endswith(f".{n}"))
    ranked = places.most_common()
    return [p for i, (p, n) in enumerate(ranked) if n == len(names) or i < 3] or ([""] if names else [])


def _compare(target: _Target, tensors: Mapping[str, Tensor], prefix: str) -> tuple[int, str] | None:
    """What stands in the way, counted and in words: tensors missing, reshaped, or more of its layers; None: nothing."""
    own = target.module.state_dict()
    missing = [k for k in target.required() if prefix + k not in tensors]
    reshaped = [
        f"{k} {tuple(tensors[prefix + k].shape)}, expected {tuple(own[name].shape)}"
        for k, name in target.names.items()
        if prefix + k in tensors and tensors[prefix + k].shape != own[name].shape
    ]
    leaves = {k.rpartition(".")[0] for k in target.names} - {""}
    parents = {k[:i] for k in target.names for i, letter in enumerate(k) if letter == "."}
    further = [
        k
        for k in (name.removeprefix(prefix) for name in tensors if name.startswith(prefix))
        if k not in target.names
        and k.rpartition(".")[2] not in COUNTERS
        and ((k.rpartition(".")[0] in leaves and k.rpartition(".")[2] in ACTING) or _is_further_layer(k, parents))
    ]
    problems = {f"of {len(target.names)} tensors missing": missing, "of another shape": reshaped, "unexpected": further}
    words = "; ".join(f"{len(names)} {what} ({_some(names)})" for what, names in problems.items() if names)
    return (len(missing) + len(reshaped) + len(further), words) if words else None


def _is_further_layer(key: str, parents: set[str]) -> bool:
    """Whether ``key`` continues a numbered list of the model, as ``layer.9.conv`` does after ``layer.8``."""
    parts = key.split(".")
    return any(
        part.isdigit() and ".".join([*parts[:i], "0"]) in parents and ".".join(parts[: i + 1]) not in parents
        for i, part in enumerate(parts[:-1])
    )


def _check_numbers(module: nn.Module, tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights that are not finite floating-point numbers."""
    own = module.state_dict()
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, tensor in tensors.items():
        if not own[name].is_floating_point():
            continue
        kind = "sparse" if tensor.layout != torch.strided else "quantised" if tensor.is_quantized else ""
        kind = kind or ("on the meta device, without values" if tensor.is_meta else "")
        if kind or not tensor.is_floating_point():
            raise CheckpointError(
                f"{what}: {name} is {kind or tensor.dtype}, expected floating-point weights",
                hint="save the weights as plain floating-point tensors: torch.save(model.float().state_dict(), FILE)",
            )
        wrong = tensor.isnan() if name not in parameters else ~tensor.isfinite()
        if n := int(wrong.sum()):
            raise CheckpointError(
                f"{what}: {name} has {n:,} of {tensor.numel():,} values that are NaN or infinite",
                hint="the training diverged, or the file is damaged: take an earlier checkpoint, or get it again",
            )


def _rank(prefix: str) -> tuple[bool, bool, int, int]:
    """The model itself before an average of it, the field's usual containers before others, short before long."""
    words = prefix.lower().rstrip(".").split(".")
    is_average = any(part in word for word in words for part in AVERAGED)
    is_other = any(part in word for word in words for part in NOT_THE_MODEL)
    return is_other, is_average, CONTAINERS.index(words[0]) if words[0] in CONTAINERS else len(CONTAINERS), len(words)


def _say(fitted: Fitted, what: str, *, is_asked: bool) -> None:
    if fitted.others and not is_asked:
        log.warning(
            f"{what}: the weights under {fitted.taken or 'no key'!r} were taken; others that fit are under "
            f"{', '.join(map(repr, fitted.others))}: --weights-key {fitted.others[0]} takes these"
        )
    if fitted.left_over:
        log.info(f"{what}: {len(fitted.left_over)} further tensors left over ({_some(fitted.left_over)})")


def _some(names: Sequence[str]) -> str:
    return f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"


def _same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[k]) for k, tensor in mine.items())


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _without_containers(name: str) -> str:
    words = name.split(".")
    while len(words) > 1 and words[0] in CONTAINERS:
        words = words[1:]
    return ".".join(words)
