"""Files: atomic writes, checked reads, sha256, and a lock that the system releases however its holder ends."""

import errno
import hashlib
import io
import json
import os
import secrets
import shlex
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import ArtifactError, StorageError
from .foreign import parse_json, reading

if TYPE_CHECKING:
    from torch import Tensor

DIGEST = "sha256"
"""The key under which a JSON file carries the digest of all the others."""
_SEAL = 64
"""Characters of a sha256 in hex, at the end of a file of ``save_torch``."""


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Write beside, then move: ``target`` is either the old file or the whole new one, never half of it."""
    if target.is_dir():
        raise StorageError(f"{target} is a folder", hint="name a file in it")
    # not the process alone: two machines on one network folder, or two containers, may have the same number
    temporary = target.with_name(f"{temporary_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise StorageError.of(error, f"cannot write {target}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_prefix(target: Path) -> str:
    """What the names of the files begin with that ``atomic_write`` writes beside ``target``."""
    return f".{target.name[:50]}."


def write_bytes(target: Path, data: bytes) -> None:
    with atomic_write(target) as temporary:
        temporary.write_bytes(data)


def save_tensors(target: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str]) -> None:
    """Atomically write a safetensors file, equal bytes for equal content: the library orders metadata as it likes."""
    from safetensors.torch import save

    data = save(tensors, metadata)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin on a multiple of 8 bytes
    write_bytes(target, len(text).to_bytes(8, "little") + text + data[start:])


def discard(folder: Path) -> None:
    """Remove a folder, whole at once for whoever looks: it is renamed, then emptied. No error where there is none."""
    gone = folder.with_name(folder.name + ".discarded")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(gone)
        shutil.rmtree(gone)


def set_aside(path: Path) -> Path:
    """Rename a damaged file, or a folder in its place; returns the new path."""
    aside = path.with_name(f"{path.name}.damaged")
    return path.replace(aside.with_name(f"{aside.name}-{secrets.token_hex(2)}") if os.path.lexists(aside) else aside)


def sha256_of(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_json(target: Path, content: Mapping[str, Any]) -> None:
    """Replace ``target`` by a JSON object that carries a digest of itself, atomically."""
    as_read = json.loads(json.dumps(content))  # where all keys are text
    write_bytes(target, json.dumps({**as_read, DIGEST: _digest(as_read)}, indent=1, sort_keys=True).encode())


def read_json(path: Path) -> dict[str, Any]:
    """What ``write_json`` wrote, without the digest, if it has one. Raises ArtifactError where it is damaged."""
    content = _checked(path, lambda: parse_json(path.read_bytes()))
    digest = content.pop(DIGEST, None)
    if digest is None:  # older files have none; nor has one whose name for it was damaged
        digests = [key for key, value in content.items() if isinstance(value, str) and len(value) == _SEAL]
        damaged = any(_digest({k: content[k] for k in content if k != key}) == content[key] for key in digests)
    else:
        damaged = digest != _digest(content)
    if damaged:
        raise ArtifactError(f"{path} is damaged: its content is not what was written", hint=_again(path))
    return content  # type: ignore[no-any-return]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def save_torch(target: Path, state: dict[str, Any]) -> None:
    """Atomically save tensors and plain values, so that ``load_torch`` reads them without unpickling code.

    The zip's comment holds the digest of all bytes before it: ``zipfile`` and torch find the same data in different
    places, so the checksums of the members alone do not vouch for what torch reads.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getvalue()[:-2] + _SEAL.to_bytes(2, "little")
    write_bytes(target, body + hashlib.sha256(body).hexdigest().encode())


def load_torch(path: Path) -> dict[str, Any]:
    """Load what ``save_torch`` wrote. Raises ArtifactError where a bit of it has changed."""
    import torch

    data = _checked(path, path.read_bytes)
    is_sealed = data[-_SEAL:] == hashlib.sha256(data[:-_SEAL]).hexdigest().encode()
    # older files have no seal: the zip ends as torch ends it, with the 22 bytes of its last record and no comment
    is_older = data[-22:-18] == b"PK\x05\x06" and data[-2:] == b"\0\0"
    if not is_sealed and not (is_older and is_whole(path)):
        raise ArtifactError(f"{path} is damaged: its content is not what was written", hint=_again(path))
    loaded = _checked(path, lambda: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
    return loaded  # type: ignore[no-any-return]


def is_whole(path: Path) -> bool:
    """Whether every checksum of a zip as ``torch.save`` writes it is right; torch does not look at them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, ValueError, RuntimeError, zlib.error):
        return False  # RuntimeError: a member says that it is encrypted, or packed by a method that nobody knows


def _checked(path: Path, load: Callable[[], Any]) -> Any:
    with reading(ArtifactError, f"{path} cannot be read", _again(path)):
        return load()


def _again(path: Path) -> str:
    return f"delete it, then run the same command again: {shlex.join(['rm', '-r', str(path)])}"


@contextmanager
def locked(file: Path, *, shared: bool = False, wait: bool = False) -> Iterator[str | None]:
    """Hold ``file`` alone; or, ``shared``, together with others who do, as long as nobody has it alone.

    Yields None, or why there is no lock: nothing then keeps others away. Raises BlockingIOError where another holds the
    file and ``wait`` is False, OSError where it cannot be opened.
    """
    # "a+": a network folder gives a shared lock only on a file open for reading, an exclusive one on one for writing
    with open(file, "a+") as handle:
        yield _lock(handle, shared, wait)


def _lock(handle: IO[str], shared: bool, wait: bool) -> str | None:
    try:
        import fcntl
    except ImportError:
        return "no locks on this system"
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if not wait and error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(error.errno, error.strerror) from error
        # such as ENOSYS of a file system that was mounted without locks, which is common on clusters
        return error.strerror or str(error)
    return None
