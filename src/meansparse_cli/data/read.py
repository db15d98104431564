"""Images in memory or on disk: an image folder (one folder a class), a zip of one, or an ``.npz``.

An ``.npz`` has ``x``, uint8 of N x H x W x C, and ``y``. An image is float32 (channels, height, width) in [0, 1]; those
of a folder or a zip are decoded as they are asked for (``pictures``, ``class_folders``).
"""

import logging
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from .class_folders import LARGEST_FILE, ClassOrder, find_classes
from .imagenet import Preprocessing, class_numbers
from .pictures import decode_picture

log = logging.getLogger(__name__)
READ_AT_MOST = 2**30  # bytes of image files that a stage reads only to know whether they are the same


class _Images(Dataset[tuple[Tensor, int]]):
    """``notes``: what a reader of the results must know of the images; each is logged once."""

    n_classes: int

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
            log.warning(sentence)


class ArrayImages(_Images):
    """Images in memory: ``x`` uint8 (n, height, width, channels) or (n, height, width), ``y`` (n,) or (n, 1)."""

    def __init__(self, x: np.ndarray, y: np.ndarray, *, source: str) -> None:
        super().__init__()
        y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
        are_images = x.dtype == np.uint8 and x.ndim in (3, 4) and 0 not in x.shape[1:]
        if not are_images or y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
            raise DataError(
                f"{source}: x is {x.dtype} {x.shape} and y is {y.dtype} {y.shape}",
                hint="expected x uint8 of shape (n, height, width, channels) and y integers of shape (n,)",
            )
        self.x = torch.from_numpy(np.ascontiguousarray(x if x.ndim == 4 else x[..., None]))
        self.y = y.astype(np.int64)
        self.n_classes = int(y.max()) + 1 if len(y) else 0
        if len(y) and int(y.min()) < 0:
            raise DataError(f"{source}: a label is {int(y.min())}; labels run from 0 to classes - 1")

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index].permute(2, 0, 1).float() / 255, int(self.y[index])


class FileImages(_Images):
    """Images decoded on demand from class folders on disk or inside a zip.

    ``is_grey``: they are given with one channel, for a model that takes such; None: nobody asked yet.
    """

    def __init__(
        self, source: Path, *, preprocessing: Preprocessing | None = None, class_order: ClassOrder | None = None
    ) -> None:
        super().__init__()
        self.source, self.preprocessing, self.class_order = source, preprocessing, class_order
        self.is_grey: bool | None = None
        self._archive: zipfile.ZipFile | None = None
        found = find_classes(source, class_order)
        self.names, self.classes, self._places = found.names, found.classes, found.labels
        for sentence in found.notes:
            self.note(sentence)
        is_imagenet = preprocessing is not None and self.has_imagenet_names
        # ImageNet's numbers are right also where a part of the classes is not there
        self.number_classes(class_numbers() if is_imagenet else {name: i for i, name in enumerate(self.classes)})

    @property
    def has_imagenet_names(self) -> bool:
        return all(name[0] == "n" and name[1:].isdigit() for name in self.classes) and (
            set(self.classes) <= class_numbers().keys()
        )

    def number_classes(self, numbers: dict[str, int]) -> None:
        """The pictures of folder ``name`` are of class ``numbers[name]``; there are as many classes as numbers."""
        self.n_classes = len(numbers)
        self.labels = [numbers[self.classes[place]] for place in self._places]

    def __len__(self) -> int:
        return len(self.names)

    def checksums(self, indices: Sequence[int]) -> list[int]:
        """A number for each image: the CRC of its file, or its size where the files take more than ``READ_AT_MOST``."""
        if self.source.is_dir():
            sizes = [(self.source / self.names[i]).stat().st_size for i in indices]
            if sum(sizes) <= READ_AT_MOST:
                return [zlib.crc32(self.read(i)) for i in indices]
            self.note(f"{self.source}: {sum(sizes) / 2**30:.1f} GiB, told from other images by names and sizes alone")
            return sizes
        with zipfile.ZipFile(self.source) as archive:
            return [archive.getinfo(self.names[i]).CRC for i in indices]

    def read(self, index: int) -> bytes:
        """The file of one image."""
        try:
            return self._read(self.names[index])
        except Exception as error:  # zipfile raises what it likes on a broken member
            raise self._unreadable(index, error) from error

    def _read(self, name: str) -> bytes:
        path = self.source / name
        if self.source.is_dir() and not path.is_file():
            raise ValueError("it is gone, or no regular file any more")
        if self._archive is None and not self.source.is_dir():
            self._archive = zipfile.ZipFile(self.source)
        size = path.stat().st_size if self._archive is None else self._archive.getinfo(name).file_size
        if size > LARGEST_FILE:
            raise ValueError(f"it has {size:,} bytes, more than any picture")
        return path.read_bytes() if self._archive is None else self._archive.read(name)

    def _unreadable(self, index: int, error: Exception) -> DataError:
        return DataError(f"{self.source}: cannot read image {self.names[index]}: {error}")

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_archive": None}  # an open zip cannot travel to a DataLoader worker

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        content = self.read(index)
        try:
            pixels = decode_picture(content, self.preprocessing, is_grey=bool(self.is_grey))
        except ValueError as error:
            raise self._unreadable(index, error) from error
        return torch.from_numpy(np.ascontiguousarray(pixels)), self.labels[index]


ImageSet = ArrayImages | FileImages


def open_images(
    path: Path, preprocessing: Preprocessing | None = None, class_order: ClassOrder | None = None
) -> ImageSet:
    if path.suffix.lower() != ".npz" or not path.is_file():
        return FileImages(path, preprocessing=preprocessing, class_order=class_order)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except Exception as error:  # numpy and zipfile raise what they like on a broken file
        raise DataError(f"{path} cannot be read: {error}", hint="expected an .npz with arrays x and y") from error
    return ArrayImages(x, y, source=str(path))
