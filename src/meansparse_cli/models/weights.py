"""Checkpoints of other people: read without running their code, fitted to a network whatever wrapper named the keys."""

import argparse
import contextlib
import hashlib
import pickle
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError

ALLOW_PICKLE_HINT = "if you trust where the file comes from, let it run its code: the same command with --allow-pickle"

CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "last")
"""Where a checkpoint keeps its weights, in the order they are looked for."""

CONSTANTS = ("mu", "sigma", "mean", "std", "normalize.mean", "normalize.std")
"""Normalisation buffers the architecture sets by itself; older checkpoints lack them."""


def read_checkpoint(path: Path, *, allow_pickle: bool = False) -> Any:
    """What a ``.pt`` or ``.safetensors`` file holds, on the CPU; no code in it is run unless ``allow_pickle``.

    Raises CheckpointError for a file that is missing, empty, a web page, cut short, or needs more than tensors.
    """
    again = f"delete {path} and fetch it again"
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}", hint="name a file, or download one: meansparse fetch")
    with open(path, "rb") as handle:
        head = handle.read(512)
    if not head:
        raise CheckpointError(f"{path} is empty", hint=again)
    if looks_like_html(head):
        raise CheckpointError(f"{path} is a web page, not a checkpoint", hint=again)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}", hint=again) from error
    is_zip = zipfile.is_zipfile(path)
    if head.startswith(b"PK") and not is_zip:
        raise CheckpointError(f"{path} ends too early: {path.stat().st_size:,} bytes of a longer file", hint=again)
    try:
        with torch.serialization.safe_globals(_harmless_types()):
            # mapped, not read: the weights are copied into the model straight from the file
            return torch.load(path, map_location="cpu", weights_only=not allow_pickle, mmap=is_zip or None)
    except pickle.UnpicklingError as error:
        if not allow_pickle and _needs_code(str(error), is_pickle=is_zip or head.startswith(b"\x80")):
            reason = str(error).split("WeightsUnpickler error:")[-1].strip().splitlines()[0]
            raise CheckpointError(f"{path} holds more than tensors: {reason}", hint=ALLOW_PICKLE_HINT) from error
        raise CheckpointError(f"{path} is not a checkpoint: {_first_line(error)}", hint=again) from error
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{path} holds Python objects whose code is not installed: {error}",
            hint="save the weights alone: torch.save(model.state_dict(), FILE)",
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {_first_line(error)}", hint=again) from error


def looks_like_html(head: bytes) -> bool:
    """Whether a file's first bytes are those of a web page."""
    text = head[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return text.startswith((b"<!", b"<html", b"<head", b"<body", b"<?xml", b"<title", b"<script"))


def fit_weights(
    module: nn.Module, checkpoint: Any, *, what: str, lenient: bool = False, mend: str | None = None
) -> None:
    """Copy a checkpoint into ``module``: every tensor the module has must be there, in its shape.

    Wrapper prefixes (``module.``, ``model.``) are taken off or put on until the keys fit. With ``lenient``, more keys
    than the module has are let pass, unless they belong to further layers of the same network. Raises CheckpointError
    and leaves the module as it was if nothing fits.
    """
    state = state_dict_of(checkpoint, what)
    wanted = module.state_dict()
    misfits = []
    for candidate in _spellings(state, module):
        n_problems, problems = _compare(candidate, wanted, lenient=lenient)
        if not n_problems:
            module.load_state_dict({key: candidate[key] for key in wanted if key in candidate}, strict=False)
            return
        misfits.append((n_problems, problems))
    _, problems = min(misfits, key=lambda misfit: misfit[0])
    raise CheckpointError(f"{what}: the weights are of another model: {problems}", hint=mend)


def state_dict_of(checkpoint: Any, what: str) -> Mapping[str, Tensor]:
    """The tensors by key, out of whichever container the checkpoint keeps them in."""
    if isinstance(checkpoint, nn.Module):
        return checkpoint.state_dict()
    if isinstance(checkpoint, Mapping):
        for container in CONTAINERS:
            if isinstance(inner := checkpoint.get(container), (Mapping, nn.Module)):
                return state_dict_of(inner, what)
        if tensors := {str(k): v for k, v in checkpoint.items() if isinstance(v, Tensor)}:
            return tensors
        found = f"a dictionary of {', '.join(map(str, list(checkpoint)[:6])) or 'nothing'}"
    else:
        found = type(checkpoint).__name__
    raise CheckpointError(
        f"{what}: no weights found, but {found}", hint=f"expected tensors by name, or one of {CONTAINERS}"
    )


def _compare(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, lenient: bool) -> tuple[int, str]:
    """How many tensors stand in the way, and a sentence that names the first few."""
    missing = [k for k in wanted if k not in state and k not in CONSTANTS and not k.endswith(".num_batches_tracked")]
    unexpected = [k for k in state if k not in wanted]
    if lenient:
        parents = {k[:i] for k in wanted for i, letter in enumerate(k) if letter == "."}
        unexpected = [k for k in unexpected if _is_further_layer(k, parents)]
    reshaped = [
        f"{k} {tuple(state[k].shape)}, expected {tuple(wanted[k].shape)}"
        for k in wanted
        if k in state and state[k].shape != wanted[k].shape
    ]
    problems = {
        f"of {len(wanted)} tensors missing": missing,
        "unexpected": unexpected,
        "of another shape": reshaped,
    }
    sentences = [
        f"{len(found)} {what} ({', '.join(found[:3])}{', ...' if len(found) > 3 else ''})"
        for what, found in problems.items()
        if found
    ]
    return len(missing) + len(unexpected) + len(reshaped), "; ".join(sentences)


def _is_further_layer(key: str, parents: set[str]) -> bool:
    """Whether ``key`` continues a numbered list of the model, as ``layer.9.conv`` does after ``layer.8``."""
    parts = key.split(".")
    return any(
        part.isdigit() and ".".join([*parts[:i], "0"]) in parents and ".".join(parts[: i + 1]) not in parents
        for i, part in enumerate(parts[:-1])
    )


def _needs_code(refusal: str, *, is_pickle: bool) -> bool:
    """Whether torch refused a file for what it would run, and not because it is no pickle at all."""
    names_a_type = any(word in refusal for word in ("GLOBAL", "unsupported class", "Unsupported class", "is blocked"))
    return names_a_type or (is_pickle and "Unsupported operand" in refusal)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _spellings(state: Mapping[str, Tensor], module: nn.Module) -> Iterator[Mapping[str, Tensor]]:
    """The same tensors under the names wrappers give them: as they are, unwrapped, and behind a normalisation."""
    bare = {k.removeprefix("module.").removeprefix("_orig_mod."): v for k, v in state.items()}
    inner = {k.removeprefix("model."): v for k, v in bare.items()}
    yield from (state, bare, inner, {f"model.{k}": v for k, v in inner.items()})
    target = getattr(module, "model", module)
    # timm renamed layers over the years, and each architecture's file knows how its old checkpoints read
    convert = getattr(sys.modules.get(type(target).__module__), "checkpoint_filter_fn", None)
    if convert is not None:
        with contextlib.suppress(KeyError, AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            converted = convert(dict(inner), target)
            yield converted if target is module else {f"model.{k}": v for k, v in converted.items()}


def _harmless_types() -> list[Any]:
    """Types often saved beside weights (arguments, scores) that hold values and run nothing."""
    scalar = np.float64(0).__reduce__()[0]
    numbers = [type(np.dtype(kind)) for kind in ("float64", "float32", "float16", "int64", "int32", "bool")]
    return [argparse.Namespace, np.dtype, *numbers, scalar, (scalar, "numpy.core.multiarray.scalar")]


def network_id(model: nn.Module) -> str:
    """The sha256 of a network's parameters and buffers, names and shapes included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
