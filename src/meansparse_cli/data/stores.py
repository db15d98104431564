"""Where picture files lie: a folder, a zip, tars as WebDataset writes them, Parquet as the Hub has it.

Every store has a name and a label for each picture, in a fixed order, and gives the bytes of one at a time: nothing is
unpacked, and nobody reads a picture that is not asked for.
"""

import json
import logging
import os
import re
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..foreign import reading
from .folders import list_pictures
from .pictures import SUFFIXES

log = logging.getLogger(__name__)

LARGEST_FILE = 2**30  # bytes of one picture
READ_AT_MOST = 2**30  # bytes of image files that a stage reads only to know whether they are the same
SHARDS = (".tar", ".parquet")


class Store(ABC):
    """``names`` of the pictures in ``where``; ``labels``: of each its class folder, or class where ``is_numbered``."""

    is_numbered = False

    def __init__(self, where: Path, names: list[str], labels: list[str]) -> None:
        self.where, self.names, self.labels = where, names, labels

    def read(self, index: int) -> bytes:
        """The file of one picture. Raises DataError where it cannot be read."""
        with reading(DataError, f"{self.where}/{self.names[index]}: cannot read image"):
            if (size := self._size(index)) > LARGEST_FILE:
                raise ValueError(f"it has {size:,} bytes, more than any picture")
            return self._read(index)

    def checksums(self, indices: Sequence[int]) -> tuple[list[int], bool]:
        """A number for each picture: the CRC of its file; or its size, then true, for more than ``READ_AT_MOST``."""
        sizes = [self._size(i) for i in indices]
        if sum(sizes) > READ_AT_MOST:
            return sizes, True
        return [zlib.crc32(self.read(i)) for i in indices], False

    @abstractmethod
    def _read(self, index: int) -> bytes: ...

    @abstractmethod
    def _size(self, index: int) -> int: ...


class FolderStore(Store):
    """One folder a class."""

    def _read(self, index: int) -> bytes:
        return (self.where / self.names[index]).read_bytes()

    def _size(self, index: int) -> int:
        return (self.where / self.names[index]).stat().st_size


class ZipStore(Store):
    """A zip of such a folder."""

    _archive: tuple[int, zipfile.ZipFile] | None = None

    def _opened(self) -> zipfile.ZipFile:
        """An open file cannot travel to a DataLoader worker, and one that was forked would share its place in it."""
        if self._archive is None or self._archive[0] != os.getpid():
            self._archive = os.getpid(), zipfile.ZipFile(self.where)
        return self._archive[1]

    def _read(self, index: int) -> bytes:
        return self._opened().read(self.names[index])

    def _size(self, index: int) -> int:
        return self._opened().getinfo(self.names[index]).file_size

    def checksums(self, indices: Sequence[int]) -> tuple[list[int], bool]:
        return [self._opened().getinfo(self.names[i]).CRC for i in indices], False

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_archive": None}


class TarStore(Store):
    """WebDataset's tars: of each key a picture, and its class as a number in ``KEY.cls`` or under ``label`` in JSON."""

    is_numbered = True

    def __init__(self, files: Sequence[Path]) -> None:
        names, labels = list[str](), list[str]()
        self._files, self._places = list(files), list[tuple[int, int, int]]()
        for f, file in enumerate(files):
            with reading(DataError, f"{file} is not a readable tar"), tarfile.open(file, "r:") as tar:
                pictures, classes = _samples(tar)
                for key, member in sorted(pictures.items()):
                    if key not in classes:
                        hint = "expected KEY.cls, or KEY.json with a label, beside each picture"
                        raise DataError(f"{file}: {key} has no class", hint=hint)
                    names.append(f"{file.name}/{member.name}")
                    labels.append(f"{classes[key]}")
                    self._places.append((f, member.offset_data, member.size))
        super().__init__(files[0].parent, names, labels)

    def _read(self, index: int) -> bytes:
        f, offset, size = self._places[index]
        with self._files[f].open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise ValueError(f"it ends after {len(content):,} of {size:,} bytes")
        return content

    def _size(self, index: int) -> int:
        return self._places[index][2]


def _samples(tar: tarfile.TarFile) -> tuple[dict[str, tarfile.TarInfo], dict[str, int]]:
    """Key -> its picture; key -> its class."""
    pictures, classes, further = dict[str, tarfile.TarInfo](), dict[str, int](), list[str]()
    for member in tar:
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if not member.isfile() or base.startswith("."):
            continue
        key = f"{folder}/{stem}"
        if f".{suffix.lower()}" in SUFFIXES:
            pictures[key] = member
        elif suffix in ("cls", "json"):
            content = tar.extractfile(member)
            assert content is not None  # of a regular file
            label = _class_in(content.read(), member.name, is_json=suffix == "json")
            if label is not None and (suffix == "cls" or key not in classes):
                classes[key] = label
        elif f".{suffix.rpartition('.')[2].lower()}" in SUFFIXES:
            further.append(member.name)
    if further:
        log.warning(
            f"{tar.name!s}: {len(further):,} pictures that are not KEY.SUFFIX left out: {', '.join(further[:5])}"
        )
    return pictures, classes


def _class_in(content: bytes, name: str, *, is_json: bool) -> int | None:
    """A number as text, or under ``label`` or ``cls`` in JSON; None where JSON says none."""
    try:
        if not is_json:
            return int(content)
        found = json.loads(content)
        label = next((found[key] for key in ("label", "cls") if key in found), None)
        return None if label is None else int(label)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{name}: no class in it: {content[:40]!r}", hint="expected a whole number, as text") from error


class ParquetStore(Store):
    """Tables as the Hub has them: a picture in ``image`` (or ``img``), as bytes and a path; ``label`` its class.

    A group of rows is read for each picture that is not in the one read last: in the order of the files it is fast.
    """

    is_numbered = True
    IMAGE, LABEL = ("image", "img"), ("label", "labels", "fine_label", "cls")

    def __init__(self, files: Sequence[Path]) -> None:
        names, labels = list[str](), list[str]()
        self._sizes, self._ends = list[int](), list[int]()
        self._groups: list[tuple[Path, int]] = []  # of rows, each with its place in its file
        for file in files:
            with reading(DataError, f"{file} is not a readable Parquet file"):
                table = _parquet().ParquetFile(file)
                columns = table.schema_arrow.names
                self._column, label = (
                    next((c for c in wanted if c in columns), "") for wanted in (self.IMAGE, self.LABEL)
                )
                if not self._column or not label:
                    raise DataError(
                        f"{file} has the columns {', '.join(columns)}", hint="expected image and label, as on the Hub"
                    )
                for g in range(table.num_row_groups):
                    self._groups.append((file, g))
                    self._ends.append(table.metadata.row_group(g).num_rows + (self._ends[-1] if self._ends else 0))
                fields = [label, *([f"{self._column}.path"] if _has_path(table, self._column) else [])]
                rows = table.read(columns=fields).to_pylist()
            # what a picture takes is not known without reading it: its share of the file
            self._sizes += [file.stat().st_size // max(1, len(rows))] * len(rows)
            for n, row in enumerate(rows):
                path = (row.get(self._column) or {}).get("path")
                names.append(f"{file.name}/{n:06d}" + (f"-{path}" if path else ""))
                labels.append(f"{row[label]}")
        self._group: tuple[int, list[Any]] | None = None
        super().__init__(files[0].parent, names, labels)

    def _read(self, index: int) -> bytes:
        at = int(np.searchsorted(self._ends, index, side="right"))
        if self._group is None or self._group[0] != at:
            file, g = self._groups[at]
            table = _parquet().ParquetFile(file).read_row_group(g, columns=[self._column])
            self._group = at, table.column(0).to_pylist()
        content = self._group[1][index - self._ends[at]]  # below 0: counted from the end of the group
        found = content["bytes"] if isinstance(content, dict) else content
        if not isinstance(found, bytes):
            raise ValueError("the table holds a path and no picture")
        return found

    def _size(self, index: int) -> int:
        return self._sizes[index]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_group": None}


def _has_path(table: Any, column: str) -> bool:
    kind = table.schema_arrow.field(column).type
    return any(kind.field(i).name == "path" for i in range(getattr(kind, "num_fields", 0)))


def _parquet() -> Any:
    try:
        from pyarrow import parquet  # optional: meansparse[data]
    except ImportError as error:
        raise DataError("Parquet files need pyarrow", hint="pip install 'meansparse[data]'") from error
    return parquet


def open_store(source: Path | Sequence[Path]) -> Store:
    """The store of a folder or a zip, or of the shards of one part. Raises DataError where it holds no picture."""
    if isinstance(source, Path):
        shards = shards_in(source) if source.is_dir() else [source] if source.suffix in SHARDS else []
        if not shards:
            return (FolderStore if source.is_dir() else ZipStore)(source, *list_pictures(source))
        source = shards
    store = TarStore(source) if source[0].suffix == ".tar" else ParquetStore(source)
    if not store.names:
        hint = f"expected KEY.SUFFIX ({', '.join(SUFFIXES)}) in tars, rows with an image and a label in Parquet files"
        raise DataError(f"no images in {', '.join(map(str, source[:3]))}", hint=hint)
    return store


def shards_of(folder: Path, *parts: str) -> list[Path]:
    """The tars or Parquet files of the first of ``parts`` that has any: ``train-00000-of-00010.parquet``, in ``folder``
    or a folder of it."""
    for part, suffix in product(parts, SHARDS):
        found = [*sorted(folder.glob(f"*{suffix}")), *sorted(folder.glob(f"*/*{suffix}"))]
        if files := [file for file in found if part in re.split("[-_.]", file.stem.lower())]:
            return files
    return []


def shards_in(folder: Path) -> list[Path]:
    """The tars of ``folder``, or else its Parquet files."""
    return next((files for suffix in SHARDS if (files := sorted(folder.glob(f"*{suffix}")))), [])
