"""Images and the three disjoint splits.

``calibration`` and ``held-out`` are disjoint parts of the training set, ``test`` is the test set. Which image falls into
which part depends on nothing but the number of training images, so every command sees the same splits.

A data set is a name (``digits``, ``cifar10``, ``cifar100``, ``imagenet``) or a path: an image folder (one folder a
class), a zip of one, an ``.npz`` (``x`` uint8, N x H x W x C, and ``y``), or a folder that holds a ``train`` and a
``test`` of any of these. Images are float32 (channels, height, width) in [0, 1].

ImageNet is a folder with ``train`` and ``val``, one folder a class named by its WordNet id. Its training images are decoded
as they are asked for; its test split is RobustBench's 5,000 validation images (``imagenet.py``).
"""

import hashlib
import io
import logging
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..errors import DataError
from .imagenet import Preprocessing, class_numbers, evaluation_images

log = logging.getLogger(__name__)

SplitName = Literal["calibration", "held-out", "test"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
READ_AT_MOST = 2**30  # bytes of image files that a stage reads only to know whether they are the same

HELD_OUT_FRACTION, HELD_OUT_AT_MOST = 0.1, 5000
SPLIT_SEED = 2406_05927
TEST_NAMES = ("test", "val", "validation")


@dataclass(frozen=True)
class DatasetFacts:
    """What is known of a data set by its name: ``image_shape`` is (channels, height, width)."""

    n_classes: int
    image_shape: tuple[int, int, int]
    eps: dict[str, str]
    """Budget by norm when none is given, as RobustBench evaluates this data set (digits: our own choice)."""


KNOWN_DATASETS: dict[str, DatasetFacts] = {
    "digits": DatasetFacts(10, (1, 8, 8), {"Linf": "0.1", "L2": "0.5"}),
    "cifar10": DatasetFacts(10, (3, 32, 32), {"Linf": "8/255", "L2": "0.5"}),
    "cifar100": DatasetFacts(100, (3, 32, 32), {"Linf": "8/255", "L2": "0.5"}),
    "imagenet": DatasetFacts(1000, (3, 224, 224), {"Linf": "4/255", "L2": "0.5"}),
}


class ArrayImages(Dataset[tuple[Tensor, int]]):
    """Images in memory: ``x`` uint8 (n, height, width, channels) or (n, height, width), ``y`` (n,)."""

    def __init__(self, x: np.ndarray, y: np.ndarray, *, source: str) -> None:
        if x.dtype != np.uint8 or x.ndim not in (3, 4) or len(x) != len(y) or not np.issubdtype(y.dtype, np.integer):
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


class FileImages(Dataset[tuple[Tensor, int]]):
    """Images decoded on demand from class folders on disk or inside a zip; classes in alphabetical order."""

    def __init__(self, source: Path, *, preprocessing: Preprocessing | None = None) -> None:
        self.source, self.preprocessing = source, preprocessing
        self._archive: zipfile.ZipFile | None = None
        if source.is_dir():
            names = _names_in(source)
        else:
            try:
                with zipfile.ZipFile(source) as archive:
                    names = sorted(archive.namelist())
            except (zipfile.BadZipFile, OSError) as error:
                raise DataError(f"{source} is not a readable zip: {error}") from error
        self.names = [n for n in names if n.lower().endswith(IMAGE_SUFFIXES) and "/" in n]
        self.classes = classes = sorted({n.split("/")[-2] for n in self.names})
        if not classes:
            raise DataError(
                f"no images in {source}",
                hint=f"expected CLASS/NAME with one of {', '.join(IMAGE_SUFFIXES)}, one folder a class",
            )
        numbers = {name: number for number, name in enumerate(classes)}
        if preprocessing is not None and set(classes) <= set(class_numbers()):
            numbers = class_numbers()  # right also where a part of the classes is not there
        self.n_classes = len(numbers)
        self.labels = [numbers[n.split("/")[-2]] for n in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def checksums(self, indices: Sequence[int]) -> list[int]:
        """One number an image: the CRC of its file, or its size where the files take more than ``READ_AT_MOST`` together."""
        if self.source.is_dir():
            sizes = [(self.source / self.names[i]).stat().st_size for i in indices]
            return sizes if sum(sizes) > READ_AT_MOST else [zlib.crc32(self.read(i)) for i in indices]
        with zipfile.ZipFile(self.source) as archive:
            return [archive.getinfo(self.names[i]).CRC for i in indices]

    def read(self, index: int) -> bytes:
        """The file of one image."""
        if self.source.is_dir():
            return (self.source / self.names[index]).read_bytes()
        if self._archive is None:
            self._archive = zipfile.ZipFile(self.source)
        return self._archive.read(self.names[index])

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_archive": None}  # an open zip cannot travel to a DataLoader worker

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image, UnidentifiedImageError

        name = self.names[index]
        try:
            image = Image.open(io.BytesIO(self.read(index))).convert("RGB")
        except (UnidentifiedImageError, OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{self.source}: cannot read image {name}: {error}") from error
        if self.preprocessing is not None:
            image = self.preprocessing.apply(image)
        pixels = torch.from_numpy(np.array(image))
        return pixels.permute(2, 0, 1).float() / 255, self.labels[index]


ImageSet = ArrayImages | FileImages


def load_split(
    dataset: str, data_dir: Path | None, split: SplitName, preprocessing: Preprocessing | None = None
) -> "Subset[tuple[Tensor, int]]":
    """The images of one split, in a fixed order. Indices are positions in the training or the test set.

    ``preprocessing`` is the model's, for ImageNet by its name; bicubic to 256, centre of 224 when not given.
    """
    if dataset == "imagenet":
        return _load_imagenet(data_dir, split, preprocessing or Preprocessing())
    train, test = _open_dataset(dataset, data_dir)
    if test is None:
        # One unnamed set: it is cut 80 / 10 / 10, always in the same way.
        order = _permutation(len(train))
        n_part = max(1, len(train) // 10)
        parts = {"test": order[:n_part], "held-out": order[n_part : 2 * n_part], "calibration": order[2 * n_part :]}
        return Subset(train, sorted(parts[split]))
    return Subset(test, range(len(test))) if split == "test" else _part_of_training(train, split)


def _part_of_training(train: "ImageSet", split: SplitName) -> "Subset[tuple[Tensor, int]]":
    order = _permutation(len(train))
    n_held_out = min(HELD_OUT_AT_MOST, int(len(train) * HELD_OUT_FRACTION))
    return Subset(train, sorted(order[:n_held_out] if split == "held-out" else order[n_held_out:]))


def take_examples(
    images: "Subset[tuple[Tensor, int]]", n_examples: int | None, *, seed: int = 0
) -> "Subset[tuple[Tensor, int]]":
    """The first ``n_examples`` of a seeded shuffle, so that a larger number contains every smaller one."""
    order = np.random.default_rng([SPLIT_SEED, seed]).permutation(len(images))
    wanted = len(images) if n_examples is None else n_examples
    if wanted > len(images):
        raise DataError(f"{wanted} examples were asked for, the split has {len(images)}")
    return Subset(images.dataset, [images.indices[i] for i in order[:wanted]])


def make_loader(
    images: Dataset[tuple[Tensor, int]], batch_size: int, n_workers: int = 0
) -> DataLoader[tuple[Tensor, int]]:
    """Batches of (images, labels) in order; nothing is shuffled, nothing is dropped."""
    return DataLoader(images, batch_size=batch_size, num_workers=n_workers, collate_fn=_stack)


def stack_examples(images: Dataset[tuple[Tensor, int]], n_workers: int = 0) -> tuple[Tensor, Tensor]:
    """All images (n, channels, height, width) and labels (n,) of a split small enough for memory."""
    batches = list(make_loader(images, 64, n_workers))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def _stack(pairs: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    sizes = sorted({tuple(x.shape) for x, _ in pairs})
    if len(sizes) > 1:
        raise DataError(
            f"images of several sizes: {_by(sizes[0])} and {_by(sizes[-1])}", hint="bring them to one size first"
        )
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


def check_images(
    images: "Subset[tuple[Tensor, int]]", n_classes: int, image_shape: tuple[int, ...], where: str
) -> None:
    """Refuse images that the model cannot mean: wrong shape, or more classes than it has logits."""
    if not len(images):
        raise DataError(f"{where} is empty")
    shape = tuple(images[0][0].shape)
    if shape != tuple(image_shape):
        raise DataError(f"{where}: images are {_by(shape)}, the model expects {_by(image_shape)}")
    found: int = images.dataset.n_classes  # type: ignore[attr-defined]
    if found != n_classes:
        raise DataError(f"{where}: {found} classes were found, the model has {n_classes}")


def content_id(images: "Subset[tuple[Tensor, int]]") -> str:
    """sha256 over what identifies the chosen images and labels: pixels in memory, names and checksums on disk."""
    digest, source = hashlib.sha256(), images.dataset
    indices = np.asarray(list(images.indices), dtype=np.int64)
    digest.update(indices.tobytes())
    if isinstance(source, ArrayImages):
        digest.update(source.y[indices].tobytes())
        digest.update(source.x.numpy()[indices].tobytes())
    elif isinstance(source, FileImages):
        for index, checksum in zip(indices, source.checksums(indices.tolist()), strict=True):
            digest.update(f"{source.names[index]} {checksum}\n".encode())
    return digest.hexdigest()


def image_ids(images: "Subset[tuple[Tensor, int]]") -> set[bytes]:
    """What tells each image from the others: its pixels in memory, its file's content on disk."""
    source, indices = images.dataset, list(images.indices)
    if isinstance(source, ArrayImages):
        return {hashlib.blake2b(source.x[i].numpy().tobytes(), digest_size=16).digest() for i in indices}
    if isinstance(source, FileImages):
        return {hashlib.blake2b(source.read(i), digest_size=16).digest() for i in indices}
    return set()


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(s) for s in shape)


def _permutation(n: int) -> list[int]:
    return np.random.default_rng(SPLIT_SEED).permutation(n).tolist()


def _open_dataset(dataset: str, data_dir: Path | None) -> tuple[ImageSet, ImageSet | None]:
    if dataset == "digits":
        return _open_digits()
    if dataset not in KNOWN_DATASETS:
        path = Path(dataset)
        if not path.exists():
            known = ", ".join(KNOWN_DATASETS)
            raise DataError(f"no data set {dataset!r}: no such path, and not one of {known}")
        return _open_path(path)
    data_dir = _check_folder(dataset, data_dir)
    if dataset.startswith("cifar") and (opened := _open_torchvision_cifar(dataset, data_dir)) is not None:
        return opened
    return _open_path(data_dir)


def _check_folder(dataset: str, data_dir: Path | None) -> Path:
    if data_dir is None:
        raise DataError(
            f"{dataset} needs a folder", hint=f"name it: --data-dir DIR ({_layouts(dataset)}), or set MEANSPARSE_DATA"
        )
    if not data_dir.is_dir():
        raise DataError(f"no folder {data_dir}", hint=f"--data-dir takes a folder with {_layouts(dataset)}")
    return data_dir


def _load_imagenet(
    data_dir: Path | None, split: SplitName, preprocessing: Preprocessing
) -> "Subset[tuple[Tensor, int]]":
    """A part of ``train``, which may be over a million files, or of ``val``; the other folder is not opened."""
    data_dir = _check_folder("imagenet", data_dir)
    if split != "test":
        if (train := _find_part(data_dir, ("train",))) is None:
            raise DataError(f"no train in {data_dir}", hint=f"--data-dir takes a folder with {_layouts('imagenet')}")
        return _part_of_training(_open_images(train, preprocessing), split)
    if (val := _find_part(data_dir, ("val", "validation", "test"))) is None:
        raise DataError(f"no val in {data_dir}", hint=f"--data-dir takes a folder with {_layouts('imagenet')}")
    images = _open_images(val, preprocessing)
    if isinstance(images, ArrayImages):
        return Subset(images, range(len(images)))
    places = {"/".join(name.split("/")[-2:]): i for i, name in enumerate(images.names)}
    wanted = evaluation_images()
    chosen = [places[name] for name in wanted if name in places]
    if 0 < len(chosen) < len(wanted):
        _say_that_it_is_a_part(val, len(chosen), len(wanted))
    # a folder of other pictures under ImageNet's class names is taken whole
    return Subset(images, chosen or range(len(images)))


@cache  # a stage opens its images more than once
def _say_that_it_is_a_part(val: Path, n_there: int, n_all: int) -> None:
    log.warning(
        f"imagenet: {val} has {n_there:,} of RobustBench's {n_all:,} validation images: these are the test split"
    )


def _layouts(dataset: str) -> str:
    pair = "train and test (or val) as image folders, zips or .npz files"
    if dataset == "imagenet":
        return "train and val, in each a folder a class named by its WordNet id"
    return f"torchvision's {dataset} files, or {pair}" if dataset.startswith("cifar") else pair


def _open_digits() -> tuple[ImageSet, ImageSet]:
    """scikit-learn's 1,797 digits (8 x 8, 16 grey levels scaled to 0..240); every fifth image is the test set."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = (bunch.images * 15).astype(np.uint8), bunch.target
    is_test = np.arange(len(y)) % 5 == 4
    train = ArrayImages(x[~is_test], y[~is_test], source="digits")
    return train, ArrayImages(x[is_test], y[is_test], source="digits")


def _open_torchvision_cifar(dataset: str, data_dir: Path) -> tuple[ImageSet, ImageSet] | None:
    from torchvision.datasets import CIFAR10, CIFAR100

    cls = CIFAR10 if dataset == "cifar10" else CIFAR100
    if not (data_dir / cls.base_folder).is_dir():
        return None
    parts = []
    for is_train in (True, False):
        try:
            part = cls(str(data_dir), train=is_train, download=False)
        except RuntimeError as error:
            raise DataError(f"{data_dir / cls.base_folder}: {error}") from error
        parts.append(ArrayImages(part.data, np.asarray(part.targets), source=str(data_dir)))
    return parts[0], parts[1]


def _open_path(path: Path) -> tuple[ImageSet, ImageSet | None]:
    if path.is_dir() and (train := _find_part(path, ("train",))) is not None:
        test = _find_part(path, TEST_NAMES)
        if test is None:
            raise DataError(
                f"{path} holds {train.name} but no test set", hint=f"expected one of {', '.join(TEST_NAMES)}"
            )
        images, test_images = _open_images(train), _open_images(test)
        if (
            isinstance(images, FileImages)
            and isinstance(test_images, FileImages)
            and images.classes != test_images.classes
        ):
            differ = sorted(set(images.classes) ^ set(test_images.classes))
            raise DataError(
                f"{train.name} has {len(images.classes)} class folders and {test.name} {len(test_images.classes)}: "
                f"{', '.join(differ[:5])} {'are' if len(differ) > 1 else 'is'} in one of them only, and classes are numbered by "
                "their order",
                hint="give both parts the same class folders",
            )
        return images, test_images
    return _open_images(path), None


def _find_part(path: Path, names: tuple[str, ...]) -> Path | None:
    for name in names:
        for suffix in ("", ".zip", ".npz"):
            if (candidate := path / f"{name}{suffix}").exists():
                return candidate
    return None


def _names_in(folder: Path) -> list[str]:
    """Every file below a folder, relative to it, in the order of its path's parts."""
    names = [
        os.path.relpath(os.path.join(at, file), folder).replace(os.sep, "/")
        for at, _, files in os.walk(folder, followlinks=True)
        for file in files
    ]
    return sorted(names, key=lambda name: name.split("/"))


def _open_images(path: Path, preprocessing: Preprocessing | None = None) -> ImageSet:
    if path.suffix != ".npz":
        return FileImages(path, preprocessing=preprocessing)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return ArrayImages(arrays["x"], arrays["y"], source=str(path))
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="expected an .npz with arrays x and y") from error
