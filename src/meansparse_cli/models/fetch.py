"""`fetch`: the weights of a model, in the cache, whole and known to load.

The cache is laid out as RobustBench's own folder of models, ``DATASET/THREAT/NAME.pt``. Beside each file a
``NAME.pt.yaml`` says how long it is and what its sha256 is; a file that no longer agrees is fetched again. A file
enters the cache only after it has been loaded into its architecture.
"""

import glob
import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from ..errors import ArtifactError, CheckpointError, ConfigError, DownloadError, StorageError
from ..files import atomic_write, is_whole, locked, save_torch, sha256_of, temporary_prefix, write_bytes
from ..foreign import read_yaml
from .download import Progress, download
from .kind import ModelKind
from .names import ModelSource, Weights, fetch_command, plain_name
from .source import kind_of
from .weights import ALLOW_PICKLE_HINT

CACHE_VARIABLE = "MEANSPARSE_CACHE"


@dataclass(frozen=True)
class FetchedFile:
    """One file of weights: ``size`` in bytes, ``origin`` is the address or the path it came from."""

    path: Path
    size: int
    sha256: str
    origin: str


def cache_folder() -> Path:
    """Where weights are kept: $MEANSPARSE_CACHE, or ``meansparse`` in the user's cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "meansparse"


def fetch_weights(
    source: ModelSource,
    *,
    cache: Path | None = None,
    from_file: Weights = None,
    weights: Weights = None,
    allow_pickle: bool = False,
    weights_key: str | None = None,
    on_progress: Progress | None = None,
) -> tuple[FetchedFile, ...]:
    """Make sure a model's weights are here, and say which they are, in the order ``load`` takes them.

    None for a factory that gives its network weights of its own. ``from_file`` imports a file (an ensemble's files, or
    their folder) that was got by other means; ``weights`` are used where they lie; otherwise the cache is asked, then
    the network. ``on_progress`` is called with bytes so far and bytes in all (None if unknown), file by file. Raises
    DownloadError with what to do by hand, CheckpointError for a file that is not this model's, StorageError.
    """
    model = kind_of(source)
    if weights is not None:
        given = tuple(_identify(path, str(path)) for path in model.paths(weights))
        check_whole([file.path for file in given])
        return given
    if model.cache_subfolder is None:
        if from_file is not None:
            raise ConfigError(
                f"{source.name} takes nothing from the cache", hint="use the file where it is: --weights FILE"
            )
        return tuple(_identify(f.path, f.origin) for f in model.weights() if f.path is not None)
    cached = _Cached(model, (cache or cache_folder()) / model.cache_subfolder, allow_pickle, weights_key)
    if from_file is None and (kept := cached.whole()):
        return kept
    try:
        cached.folder.mkdir(parents=True, exist_ok=True)
        # where the file system has no locks: two downloads at worst, never a wrong file
        with locked(cached.folder / f".{cached.stem}.lock", wait=True):
            cached.tidy()
            if from_file is not None:
                return cached.import_files(model.paths(from_file))
            # another process may have finished while this one waited
            if kept := cached.whole() or cached.adopt():
                return kept
            is_address = cached.wanted[0].origin.startswith("http")
            return cached.download(on_progress) if is_address else cached.save()
    except OSError as error:
        hint = f"choose another folder: {CACHE_VARIABLE}=DIR"
        raise StorageError.of(error, f"cannot write {cached.folder}", hint=hint) from error


class _Cached:
    """The place of one model in the cache."""

    def __init__(self, model: ModelKind, folder: Path, allow_pickle: bool, weights_key: str | None) -> None:
        self.model, self.folder, self.allow_pickle, self.weights_key = model, folder, allow_pickle, weights_key
        self.name, self.stem = model.source.name, plain_name(model.source.name)
        self.wanted = model.weights()
        self.targets = [folder / file.file_name for file in self.wanted]
        self.alone = [folder / f"{self.stem}{suffix}" for suffix in (".pt", ".safetensors")]
        """Where one file with all weights is kept, also for an ensemble."""

    def whole(self) -> tuple[FetchedFile, ...] | None:
        """The cached files if all are as they were when they were taken, else None."""
        for candidates in (self.targets, *([path] for path in self.alone)):
            records = tuple(r for target in candidates if (r := _recorded(target)) is not None)
            if len(records) == len(candidates):
                return records
        return None

    def tidy(self) -> None:
        """Remove what killed imports left half written; what a download has so far is kept, it goes on."""
        for target in (*self.targets, *self.alone):
            for part in target.parent.glob(f"{glob.escape(temporary_prefix(target))}*-*.part"):
                part.unlink(missing_ok=True)

    def adopt(self) -> tuple[FetchedFile, ...] | None:
        """Files without a side file, put here by hand or by a run killed just before it wrote one, if they load."""
        if not all(t.is_file() for t in self.targets) or any(_side_file(t).exists() for t in self.targets):
            return None
        try:
            self.check_loads(self.targets)
        except CheckpointError:
            return None
        return tuple(_record(target, "found in the cache") for target in self.targets)

    def import_files(self, paths: Sequence[Path]) -> tuple[FetchedFile, ...]:
        """Copies of files that were got by other means."""
        self.check_loads(paths)
        targets = self.targets
        if len(paths) == 1:  # also an ensemble saved as one; safetensors are known by their suffix
            targets = [self.alone[1] if paths[0].suffix == ".safetensors" else self.alone[0]]
        kept = tuple(_keep(p, t, str(p.resolve()), _copy) for p, t in zip(paths, targets, strict=True))
        for older in {*self.targets, *self.alone}.difference(targets):
            _side_file(older).unlink(missing_ok=True)  # from now on the imported file is the one
        return kept

    def save(self) -> tuple[FetchedFile, ...]:
        """Keep what a library gives in our own cache, so that later runs use the same bytes without a network."""
        (target,) = self.targets
        save_torch(target, self.model.load().state_dict())
        return (_record(target, self.name),)

    def download(self, on_progress: Progress | None) -> tuple[FetchedFile, ...]:
        """Each file waits under another name until all of them have been loaded together."""
        arrived = []
        for file, target in zip(self.wanted, self.targets, strict=True):
            waiting = target.with_name(f"{target.name}.unchecked")
            if not waiting.exists() and _recorded(target) is not None:
                arrived.append(target)
                continue
            try:
                if not waiting.exists():
                    download(file.origin, waiting, expected_sha256=file.sha256, on_progress=on_progress)
            except DownloadError as error:
                raise DownloadError(f"could not download {self.name}: {error}", hint=self.by_hand()) from error
            arrived.append(waiting)
        try:
            self.check_loads(arrived)
        except CheckpointError as error:
            if error.hint == ALLOW_PICKLE_HINT:
                raise  # nothing is wrong with the file: with the flag it is taken without another download
            for path in arrived:
                path.unlink(missing_ok=True)
            raise DownloadError(
                f"what was downloaded for {self.name} cannot be used: {error.message}", hint=self.by_hand()
            ) from error
        return tuple(
            _keep(path, target, file.origin, os.replace)
            for path, target, file in zip(arrived, self.targets, self.wanted, strict=True)
        )

    def check_loads(self, paths: Sequence[Path]) -> None:
        """Load the files into the model they are for, once, to see that it works."""
        check_whole(paths)
        self.model.load(paths, allow_pickle=self.allow_pickle, weights_key=self.weights_key)

    def by_hand(self) -> str:
        urls = [file.origin for file in self.wanted]
        what, option = ("it", "FILE") if len(urls) == 1 else ("them, in this order, into one folder", "FOLDER")
        listed = "\n".join(f"  {url}" for url in urls)
        return (
            f"fetch {what} by hand, with a browser or on another machine:\n{listed}\n"
            f"then: {fetch_command(self.model.source)} --from-file {option}"
        )


def check_whole(paths: Sequence[Path]) -> None:
    """Refuse zip files, as PyTorch writes them, whose content is not what their own checksums say."""
    for path in paths:
        if zipfile.is_zipfile(path) and not is_whole(path):
            raise CheckpointError(f"{path} is damaged, or encrypted", hint="get it again: its bytes have changed")


def _keep(path: Path, target: Path, origin: str, move: Callable[[Path, Path], object]) -> FetchedFile:
    if path.resolve() != target.resolve():
        _side_file(target).unlink(missing_ok=True)  # it speaks of the file that is being replaced
        move(path, target)
    return _record(target, origin)


def _copy(path: Path, target: Path) -> None:
    with atomic_write(target) as temporary:
        shutil.copyfile(path, temporary)


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
        found = FetchedFile(target, **read_yaml(_side_file(target), ArtifactError, hint=""))
    except (OSError, ArtifactError, TypeError, ValueError):
        return None
    is_same = target.is_file() and target.stat().st_size == found.size and sha256_of(target) == found.sha256
    return found if is_same else None
