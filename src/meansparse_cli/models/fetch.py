"""`fetch`: the weights of a model, in the cache, whole and known to load.

The cache is laid out as RobustBench's own folder of models, ``DATASET/THREAT/NAME.pt``. Beside each file a
``NAME.pt.yaml`` says how long it is and what its sha256 is; a file that no longer agrees is fetched again. A file
enters the cache only after it has been loaded into its architecture, so that a web page, half a file or another
model's weights are never "already there".
"""

import contextlib
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import CheckpointError, ConfigError, DownloadError, StorageError
from ..files import atomic_write, save_torch, sha256_of, write_bytes
from . import zoo
from .download import Progress, download
from .source import ModelSource, embedded_weights, load_model, weight_paths
from .weights_file import ALLOW_PICKLE_HINT

GOOGLE_DRIVE_URL = "https://drive.google.com/uc?export=download&confirm=t&id="
"""An id of the zoo is put behind it. The same address works in a browser."""

CACHE_VARIABLE = "MEANSPARSE_CACHE"


@dataclass(frozen=True)
class FetchedFile:
    """One file of weights: ``size`` in bytes, ``origin`` is the address or the path it came from."""

    path: Path
    size: int
    sha256: str
    origin: str


@dataclass(frozen=True)
class FetchedWeights:
    """What a model's weights are: ``path`` and ``sha256`` of the first file, ``size`` in bytes of all of them.

    ``files`` has all, in the order ``load_model`` takes them: one, or an ensemble's several, or none for a factory that
    loads its own weights (then ``path`` is None).
    """

    path: Path | None
    sha256: str
    size: int
    origin: str
    files: tuple[FetchedFile, ...]

    @property
    def paths(self) -> tuple[Path, ...]:
        """What to give to ``load_model``."""
        return tuple(f.path for f in self.files)


def _fetched(files: Iterable[FetchedFile], *, origin: str | None = None) -> FetchedWeights:
    files = tuple(files)
    return FetchedWeights(
        path=files[0].path if files else None,
        sha256=files[0].sha256 if files else "",
        size=sum(f.size for f in files),
        origin=origin or ", ".join(f.origin for f in files),
        files=files,
    )


def cache_folder() -> Path:
    """Where weights are kept: $MEANSPARSE_CACHE, or ``meansparse`` in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "meansparse"


def fetch_weights(
    source: ModelSource,
    *,
    cache: Path | None = None,
    from_file: Path | Sequence[Path] | None = None,
    weights: Path | Sequence[Path] | None = None,
    allow_pickle: bool = False,
    on_progress: Progress | None = None,
) -> FetchedWeights:
    """Make sure a model's weights are here, and say which they are.

    ``from_file`` imports a file (an ensemble's files, or their folder) that was got by other means; ``weights`` are
    used where they lie and only identified; otherwise the cache is asked, then the network. ``on_progress`` is called
    with bytes so far and bytes in all (None if unknown), file by file. Raises DownloadError with what to do by hand,
    CheckpointError for a file that is not this model's, StorageError when the disk is full.
    """
    if weights is not None:
        return _fetched(_identify(p, origin=str(p)) for p in weight_paths(source, weights))
    if source.kind in ("embedded", "factory"):
        if from_file is not None:
            raise ConfigError(
                f"{source.name} takes nothing from the cache", hint="use the file where it is: --weights FILE"
            )
        if source.kind == "factory":
            return _fetched((), origin=source.name)
        trained = source.name.endswith(".safetensors")
        origin = source.name if trained else f"embedded:{source.name}"
        return _fetched([_identify(embedded_weights(source), origin=origin)])
    folder = (cache_folder() if cache is None else cache) / _subfolder(source)
    stem = _plain(source.name)
    wanted = zoo.zoo_source(source.entry) if source.kind == "zoo" else (zoo.WeightFile(f"{stem}.pt"),)
    targets = [folder / w.file_name for w in wanted]
    alone = [folder / f"{stem}{suffix}" for suffix in (".pt", ".safetensors")]
    if from_file is None and (kept := _whole_in_cache(targets, alone)):
        return _fetched(kept)
    with _lock(folder / f".{stem}.lock"):
        if from_file is not None:
            return _import_files(source, weight_paths(source, from_file), targets, alone, allow_pickle)
        # another process may have finished while this one waited
        if kept := _whole_in_cache(targets, alone) or _adopt(source, targets, allow_pickle):
            return _fetched(kept)
        if source.kind == "zoo":
            return _download_all(source, wanted, targets, allow_pickle, on_progress)
        return _fetched([_save_timm(source, targets[0])])


def file_url(file: zoo.WeightFile) -> str:
    """The address a file of the zoo is downloaded from."""
    return file.url if file.url is not None else f"{GOOGLE_DRIVE_URL}{file.drive_id}"


def _download_all(
    source: ModelSource,
    wanted: Sequence[zoo.WeightFile],
    targets: Sequence[Path],
    allow_pickle: bool,
    on_progress: Progress | None,
) -> FetchedWeights:
    origins = [file_url(w) for w in wanted]
    # each file waits under another name until all of them have been loaded together
    waiting = [t.with_name(f"{t.name}.unchecked") for t in targets]
    for file, url, target, path in zip(wanted, origins, targets, waiting, strict=True):
        if path.exists() or _recorded(target) is not None:
            continue
        try:
            download(url, path, expected_sha256=file.sha256, on_progress=on_progress)
        except DownloadError as error:
            raise DownloadError(f"could not download {source.name}: {error}", hint=_by_hand(source, origins)) from error
    arrived = [w if w.exists() else t for w, t in zip(waiting, targets, strict=True)]
    try:
        _check_loads(source, arrived, allow_pickle)
    except CheckpointError as error:
        if error.hint == ALLOW_PICKLE_HINT:
            raise  # nothing is wrong with the file: with the flag it is taken without another download
        for path in arrived:
            path.unlink(missing_ok=True)
        raise DownloadError(
            f"what was downloaded for {source.name} cannot be used: {error.message}", hint=_by_hand(source, origins)
        ) from error
    return _fetched(
        _keep(path, target, origin, os.replace) for path, target, origin in zip(arrived, targets, origins, strict=True)
    )


def _import_files(
    source: ModelSource, paths: Sequence[Path], targets: Sequence[Path], alone: Sequence[Path], allow_pickle: bool
) -> FetchedWeights:
    _check_loads(source, paths, allow_pickle)
    if len(paths) == 1:  # also an ensemble saved as one; safetensors are known by their suffix
        targets = [alone[1] if paths[0].suffix == ".safetensors" else alone[0]]
    kept = tuple(_keep(p, t, str(p.resolve()), _copy) for p, t in zip(paths, targets, strict=True))
    for older in {*targets, *alone} - {f.path for f in kept}:
        _side_file(older).unlink(missing_ok=True)  # from now on the imported file is the one
    return _fetched(kept)


def _whole_in_cache(targets: Sequence[Path], alone: Sequence[Path]) -> tuple[FetchedFile, ...] | None:
    """The cached files if all are as they were when they were taken, else None."""
    for candidates in (targets, *([a] for a in alone)):
        records = tuple(r for t in candidates if (r := _recorded(t)) is not None)
        if len(records) == len(candidates):
            return records
    return None


def _adopt(source: ModelSource, targets: Sequence[Path], allow_pickle: bool) -> tuple[FetchedFile, ...] | None:
    """Files without a side file, put here by hand or by a run killed just before it wrote one, if they load."""
    if not all(t.is_file() for t in targets) or any(_side_file(t).exists() for t in targets):
        return None
    try:
        _check_loads(source, targets, allow_pickle)
    except CheckpointError:
        return None
    return tuple(_record(t, "found in the cache") for t in targets)


def _check_loads(source: ModelSource, paths: Sequence[Path], allow_pickle: bool) -> None:
    """Load the files into the model they are for, once, to see that it works."""
    for path in paths:
        if zipfile.is_zipfile(path):
            # torch maps the file and leaves the checksums of its members alone
            with zipfile.ZipFile(path) as archive:
                try:
                    damaged = archive.testzip()
                except (zipfile.BadZipFile, EOFError, OSError) as error:
                    damaged = str(error)
            if damaged is not None:
                raise CheckpointError(f"{path} is damaged at {damaged}", hint="get it again: its bytes have changed")
    load_model(source, paths, allow_pickle=allow_pickle)


def _keep(path: Path, target: Path, origin: str, move: Callable[[Path, Path], object]) -> FetchedFile:
    if path != target:
        _side_file(target).unlink(missing_ok=True)  # it speaks of the file that is being replaced
        move(path, target)
    return _record(target, origin)


def _copy(path: Path, target: Path) -> None:
    if path.resolve() == target.resolve():
        return
    with atomic_write(target) as temporary:
        shutil.copyfile(path, temporary)


def _save_timm(source: ModelSource, target: Path) -> FetchedFile:
    """Keep what timm's hub gives in our own cache, so that later runs use the same bytes without a network."""
    save_torch(target, load_model(source).state_dict())
    return _record(target, source.name)


def _identify(path: Path, origin: str) -> FetchedFile:
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}", hint="--weights takes a file, or an ensemble's folder of files")
    path = path.resolve()  # a run is used from other folders too
    return FetchedFile(path, path.stat().st_size, sha256_of(path), origin)


def _side_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.yaml")


def _record(target: Path, origin: str) -> FetchedFile:
    found = _identify(target, origin)
    record = {"size": found.size, "sha256": found.sha256, "origin": origin}
    write_bytes(_side_file(target), yaml.safe_dump(record, sort_keys=False).encode())
    return found


def _recorded(target: Path) -> FetchedFile | None:
    """The file as its side file describes it, or None if either is missing or they disagree."""
    try:
        record = yaml.safe_load(_side_file(target).read_text())
        size, sha256, origin = int(record["size"]), str(record["sha256"]), str(record["origin"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None
    if not target.is_file() or target.stat().st_size != size or sha256_of(target) != sha256:
        return None
    return FetchedFile(target, size, sha256, origin)


def _subfolder(source: ModelSource) -> Path:
    return Path(source.dataset, source.threat) if source.kind == "zoo" else Path(source.kind)


def _plain(name: str) -> str:
    """A model's name as a file name."""
    return re.sub(r"[^\w.+-]+", "_", name.removeprefix("timm:")).strip("._") or "model"


def _by_hand(source: ModelSource, urls: Sequence[str]) -> str:
    command = zoo.fetch_command(source.name, source.dataset, source.threat)
    what, option = ("it", "FILE") if len(urls) == 1 else ("them, in this order, into one folder", "FOLDER")
    listed = "\n".join(f"  {url}" for url in urls)
    return (
        f"fetch {what} by hand, with a browser or on another machine:\n{listed}\nthen: {command} --from-file {option}"
    )


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process a model: jobs that start together on a cluster download once, the others wait and find the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "w")  # noqa: SIM115 - closed below, the lock lives as long as it is open
    except OSError as error:
        raise StorageError(
            f"cannot write {path.parent}: {error.strerror or error}",
            hint=f"choose another folder: {CACHE_VARIABLE}=DIR",
        ) from error
    with handle:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)  # released by the system, also when the process is killed
        except (ImportError, OSError):
            pass  # a file system without locks: two downloads at worst, never a wrong file
        yield
