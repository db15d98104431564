"""Images in memory or on disk: an image folder (one folder a class), a zip of one, or an ``.npz``.

An ``.npz`` has ``x``, uint8 of N x H x W x C, and ``y``. An image is float32 (channels, height, width) in [0, 1]; those
of a folder or a zip are decoded as they are asked for.
"""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from ..foreign import reading
from .folders import ClassOrder, in_order, list_pictures
from .imagenet import Preprocessing, class_numbers
from .pictures import decode

LARGEST_FILE = 2**30  # bytes of one picture
READ_AT_MOST = 2**30  # bytes of image files that a stage reads only to know whether they are the same


class ArrayImages(Dataset[tuple[Tensor, int]]):
    """Images in memory: ``x`` uint8 (n, height, width, channels) or (n, height, width), ``y`` (n,)."""

    def __init__(self, x: np.ndarray, y: np.ndarray, *, source: str) -> None:
        if y.ndim == 2 and y.shape[1] == 1:
            y = y[:, 0]  # a column, as MATLAB files and MedMNIST have it
        if y.ndim == 2:
            raise DataError(
                f"{source}: y has shape {y.shape}: one-hot, by the look of it",
                hint="expected integers of shape (n,): y.argmax(1)",
            )
        if (
            x.dtype != np.uint8
            or x.ndim not in (3, 4)
            or 0 in x.shape[1:]
            or y.ndim != 1
            or len(x) != len(y)
            or not np.issubdtype(y.dtype, np.integer)
        ):
            raise DataError(
                f"{source}: x is {x.dtype} {x.shape} and y is {y.dtype} {y.shape}",
                hint="expected x uint8 of shape (n, height, width, channels) and y integers of shape (n,)",
            )
        self.x = torch.from_numpy(np.ascontiguousarray(x if x.ndim == 4 else x[..., None]))
        self.y = y.astype(np.int64)
        self.n_classes = int(self.y.max()) + 1 if len(y) else 0
        if len(y) and int(self.y.min()) < 0:
            raise DataError(f"{source}: a label is {int(self.y.min())}; labels run from 0 to classes - 1")

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index].permute(2, 0, 1).float() / 255, int(self.y[index])


class FileImages(Dataset[tuple[Tensor, int]]):
    """Images decoded on demand from class folders on disk or inside a zip; classes in alphabetical order."""

    def __init__(self, source: Path, *, preprocessing: Preprocessing | None = None, order: ClassOrder = "text") -> None:
        self.source, self.preprocessing, self.order = source, preprocessing, order
        self.channels = 3
        self.sizes_alone = False
        self._archive: zipfile.ZipFile | None = None
        listing = list_pictures(source)
        self.names, self._folders = listing.names, listing.labels
        self.classes = in_order(set(listing.labels), order, str(source))
        numbers = {name: number for number, name in enumerate(self.classes)}
        if preprocessing is not None and numbers.keys() <= class_numbers().keys():
            numbers = class_numbers()  # right also where a part of the classes is not there
        self.number_classes(numbers)

    def number_classes(self, numbers: Mapping[str, int]) -> None:
        """Give each class folder the logit that ``numbers`` has for it."""
        self.n_classes = len(numbers)
        self.labels = [numbers[folder] for folder in self._folders]

    def __len__(self) -> int:
        return len(self.names)

    def checksums(self, indices: Sequence[int]) -> list[int]:
        """A number for each image: the CRC of its file, or its size where the files take more than ``READ_AT_MOST``."""
        if self.source.is_dir():
            sizes = [(self.source / self.names[i]).stat().st_size for i in indices]
            if sum(sizes) > READ_AT_MOST:
                self.sizes_alone = True
                return sizes
            return [zlib.crc32(self.read(i)) for i in indices]
        with zipfile.ZipFile(self.source) as archive:
            return [archive.getinfo(self.names[i]).CRC for i in indices]

    def read(self, index: int) -> bytes:
        """The file of one image."""
        name = self.names[index]
        with reading(DataError, f"{self.source}/{name}: cannot read image"):
            if self._archive is None and not self.source.is_dir():
                self._archive = zipfile.ZipFile(self.source)
            path = self.source / name
            size = path.stat().st_size if self._archive is None else self._archive.getinfo(name).file_size
            if size > LARGEST_FILE:
                raise ValueError(f"it has {size:,} bytes, more than any picture")
            return path.read_bytes() if self._archive is None else self._archive.read(name)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_archive": None}  # an open zip cannot travel to a DataLoader worker

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = decode(self.read(index), f"{self.source}/{self.names[index]}", channels=self.channels)
        if self.preprocessing is not None:
            image = self.preprocessing.apply(image)
        pixels = torch.from_numpy(np.array(image))
        return pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1).float() / 255, self.labels[index]


ImageSet = ArrayImages | FileImages


def open_images(path: Path, preprocessing: Preprocessing | None = None, *, order: ClassOrder = "text") -> ImageSet:
    if path.exists() and not (path.is_dir() or path.is_file()):
        raise DataError(f"{path} is a device or a pipe", hint="expected an image folder, a zip of one, or an .npz")
    if path.suffix != ".npz":
        return FileImages(path, preprocessing=preprocessing, order=order)
    hint = "expected an .npz with arrays x and y"
    with reading(DataError, f"{path} cannot be read", hint), np.load(path, allow_pickle=False) as arrays:
        return ArrayImages(arrays["x"], arrays["y"], source=str(path))
