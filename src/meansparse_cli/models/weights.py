"""Checkpoints of other people: files read without running their code, and what tells networks apart."""

import argparse
import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError
from ..foreign import first_line, reading

ALLOW_PICKLE_HINT = "if you trust where the file comes from, let it run its code: the same command with --allow-pickle"

CONTAINERS = ("state_dict", "model_state_dict", "model", "net", "last")
"""Where a checkpoint keeps its weights, in the order they are looked for."""


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
    if (kind := _other_kind(path, head)) is not None:
        raise CheckpointError(f"{path} is {kind[0]}, whatever its name says", hint=kind[1])
    if path.suffix == ".safetensors" or _is_safetensors(path, head):
        with reading(CheckpointError, f"{path} is not a whole safetensors file", again):
            return load_file(path)
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
        raise CheckpointError(f"{path} is not a checkpoint: {first_line(error)}", hint=again) from error
    except (ImportError, AttributeError) as error:
        raise CheckpointError(
            f"{path} holds Python objects whose code is not installed: {error}",
            hint="save the weights alone: torch.save(model.state_dict(), FILE)",
        ) from error
    except Exception as error:
        raise CheckpointError(f"{path} is not a whole checkpoint: {first_line(error)}", hint=again) from error


OTHER_KINDS: dict[bytes, tuple[str, str]] = {
    b"\x1f\x8b": ("compressed with gzip", "unpack it first: gunzip"),
    b"BZh": ("compressed with bzip2", "unpack it first: bunzip2"),
    b"\xfd7zXZ": ("compressed with xz", "unpack it first: unxz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it first: unzstd"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it first"),
    b"Rar!": ("a RAR archive", "unpack it first"),
    b"\x93NUMPY": ("one NumPy array (.npy)", "expected tensors by name: torch.save(model.state_dict(), FILE)"),
    b"\x89HDF": ("an HDF5 file, as Keras writes", "expected a PyTorch checkpoint or safetensors"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file", "get the file itself: git lfs pull"),
    b"%PDF": ("a PDF", "expected a PyTorch checkpoint or safetensors"),
    b"\x89PNG": ("a picture", "expected a PyTorch checkpoint or safetensors"),
}
"""What people take for checkpoints, by its first bytes: what it is, and what to do."""


def _other_kind(path: Path, head: bytes) -> tuple[str, str] | None:
    for magic, kind in OTHER_KINDS.items():
        if head.startswith(magic):
            return kind
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.split("/")[1:2] == ["code"] for name in names):
        save = "torch.save(torch.jit.load(FILE).state_dict(), NEW)"
        return "TorchScript: a program beside its weights", f"save its weights alone, if you trust it: {save}"
    if any(name.endswith(".npy") for name in names):
        return "NumPy arrays (.npz)", "expected tensors by name: torch.save(model.state_dict(), FILE)"
    if not any(name.endswith("data.pkl") for name in names):
        return "a zip archive, and no checkpoint", f"unpack it first; it holds {', '.join(names[:3]) or 'nothing'}"
    return None


def _is_safetensors(path: Path, head: bytes) -> bool:
    """Whether a file begins as safetensors do, with the length of a header and the header itself."""
    return head[8:9] == b"{" and 2 < int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


def looks_like_html(head: bytes) -> bool:
    """Whether a file's first bytes are those of a web page."""
    text = head[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return text.startswith((b"<!", b"<html", b"<head", b"<body", b"<?xml", b"<title", b"<script"))


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


def _needs_code(refusal: str, *, is_pickle: bool) -> bool:
    """Whether torch refused a file for what it would run, and not because it is no pickle at all."""
    names_a_type = any(word in refusal for word in ("GLOBAL", "unsupported class", "Unsupported class", "is blocked"))
    return names_a_type or (is_pickle and "Unsupported operand" in refusal)


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
