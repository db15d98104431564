"""Images in memory, from an ``.npz``, or on disk, in any of ``stores``, decoded as they are asked for.

An ``.npz`` has ``x``, uint8 of N x H x W x C, and ``y``. An image is float32 (channels, height, width) in [0, 1].
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from ..foreign import reading
from .folders import ClassOrder, in_order
from .imagenet import Preprocessing, class_numbers
from .pictures import decode
from .stores import open_store

MOST_CLASSES = 1_000_000


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
    """Images decoded on demand; class folders in alphabetical order, classes that are numbers as they are."""

    def __init__(
        self, source: Path | Sequence[Path], *, preprocessing: Preprocessing | None = None, order: ClassOrder = "text"
    ) -> None:
        self.store, self.preprocessing, self.order = open_store(source), preprocessing, order
        self.channels = 3
        self.sizes_alone = False
        self.source, self.names, self._classes = self.store.where, self.store.names, self.store.labels
        if self.store.is_numbered:
            self.classes = _numbers(set(self._classes), f"{self.source}")
            self.number_classes({f"{number}": number for number in range(int(self.classes[-1]) + 1)})
            return
        self.classes = in_order(set(self._classes), order, str(self.source))
        numbers = {name: number for number, name in enumerate(self.classes)}
        if preprocessing is not None and numbers.keys() <= class_numbers().keys():
            numbers = class_numbers()  # right also where a part of the classes is not there
        self.number_classes(numbers)

    def number_classes(self, numbers: Mapping[str, int]) -> None:
        """Give each class the logit that ``numbers`` has for it."""
        self.n_classes = len(numbers)
        self.labels = [numbers[name] for name in self._classes]

    def __len__(self) -> int:
        return len(self.names)

    def checksums(self, indices: Sequence[int]) -> list[int]:
        """A number for each image, by which two are told apart."""
        found, self.sizes_alone = self.store.checksums(indices)
        return found

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = decode(self.store.read(index), f"{self.source}/{self.names[index]}", channels=self.channels)
        if self.preprocessing is not None:
            image = self.preprocessing.apply(image)
        pixels = torch.from_numpy(np.array(image))
        return pixels.reshape(*pixels.shape[:2], -1).permute(2, 0, 1).float() / 255, self.labels[index]


def _numbers(classes: set[str], where: str) -> list[str]:
    """Ascending; DataError for what is no class from 0 on, as of a test part whose classes are kept secret."""
    if bad := sorted(name for name in classes if not name.isdecimal()):
        hint = "expected numbers from 0 on; a test part without classes cannot be evaluated: use its validation part"
        raise DataError(f"{where}: class {bad[0]}", hint=hint)
    if int(last := max(classes, key=int)) >= MOST_CLASSES:
        raise DataError(f"{where}: class {last}; expected fewer than {MOST_CLASSES:,} classes, numbered from 0")
    return sorted(classes, key=int)


ImageSet = ArrayImages | FileImages


def open_images(
    path: Path | Sequence[Path], preprocessing: Preprocessing | None = None, *, order: ClassOrder = "text"
) -> ImageSet:
    """``path``: a folder, a zip, an ``.npz``, a tar or a Parquet file; or several of the last two."""
    if not isinstance(path, Path):
        return FileImages(path, preprocessing=preprocessing, order=order)
    if path.exists() and not (path.is_dir() or path.is_file()):
        raise DataError(f"{path} is a device or a pipe", hint="expected an image folder, a zip of one, or an .npz")
    if path.suffix != ".npz":
        return FileImages(path, preprocessing=preprocessing, order=order)
    hint = "expected an .npz with arrays x and y"
    with reading(DataError, f"{path} cannot be read", hint), np.load(path, allow_pickle=False) as arrays:
        return ArrayImages(arrays["x"], arrays["y"], source=str(path))
