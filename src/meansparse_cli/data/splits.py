"""Images and the three disjoint splits.

``calibration`` and ``held-out`` are disjoint parts of the training set, ``test`` is the test set. Which image falls
into which part depends on nothing but the number of training images, so every command sees the same splits.

A data set is a name (``digits``, ``cifar10``, ``cifar100``, ``imagenet``) or a path: an image folder (one folder a
class), a zip of one, an ``.npz`` (``x`` uint8, N x H x W x C, and ``y``), or a folder that holds a ``train`` and a
``test`` of any of these. Images are float32 (channels, height, width) in [0, 1].

ImageNet is a folder with ``train`` and ``val``, one folder a class named by its WordNet id. Its training images are
decoded as they are asked for; its test split is RobustBench's 5,000 validation images (``imagenet.py``).
"""

import logging
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from ..errors import DataError
from .examples import in_words
from .facts import KNOWN_DATASETS
from .imagenet import Preprocessing, evaluation_images
from .read import ArrayImages, FileImages, ImageSet, open_images

log = logging.getLogger(__name__)

SplitName = Literal["calibration", "held-out", "test"]
Split = Subset[tuple[Tensor, int]]
"""Images of a data set, by their positions in its training or test set."""


HELD_OUT_FRACTION, HELD_OUT_AT_MOST = 0.1, 5000
SPLIT_SEED = 2406_05927
TEST_NAMES = ("test", "val", "validation")


def load_split(
    dataset: str, data_dir: Path | None, split: SplitName, preprocessing: Preprocessing | None = None
) -> Split:
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


def _part_of_training(train: "ImageSet", split: SplitName) -> Split:
    order = _permutation(len(train))
    n_held_out = min(HELD_OUT_AT_MOST, int(len(train) * HELD_OUT_FRACTION))
    return Subset(train, sorted(order[:n_held_out] if split == "held-out" else order[n_held_out:]))


def take_examples(images: Split, n_examples: int | None, *, seed: int = 0) -> Split:
    """The first ``n_examples`` of a seeded shuffle, so that a larger number contains every smaller one."""
    order = np.random.default_rng([SPLIT_SEED, seed]).permutation(len(images))
    wanted = len(images) if n_examples is None else n_examples
    if wanted > len(images):
        raise DataError(f"{wanted} examples were asked for, the split has {len(images)}")
    return Subset(images.dataset, [images.indices[i] for i in order[:wanted]])


def check_images(images: Split, n_classes: int, image_shape: tuple[int, ...], where: str) -> None:
    """Refuse images that the model cannot mean: wrong shape, or more classes than it has logits."""
    if not len(images):
        raise DataError(f"{where} is empty")
    shape = tuple(images[0][0].shape)
    if shape != tuple(image_shape):
        raise DataError(f"{where}: images are {in_words(shape)}, the model expects {in_words(image_shape)}")
    found: int = images.dataset.n_classes  # type: ignore[attr-defined]
    if found != n_classes:
        raise DataError(f"{where}: {found} classes were found, the model has {n_classes}")


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


def _load_imagenet(data_dir: Path | None, split: SplitName, preprocessing: Preprocessing) -> Split:
    """A part of ``train``, which may be over a million files, or of ``val``; the other folder is not opened."""
    data_dir = _check_folder("imagenet", data_dir)
    if split != "test":
        if (train := _find_part(data_dir, ("train",))) is None:
            raise DataError(f"no train in {data_dir}", hint=f"--data-dir takes a folder with {_layouts('imagenet')}")
        return _part_of_training(open_images(train, preprocessing), split)
    if (val := _find_part(data_dir, ("val", "validation", "test"))) is None:
        raise DataError(f"no val in {data_dir}", hint=f"--data-dir takes a folder with {_layouts('imagenet')}")
    images = open_images(val, preprocessing)
    if isinstance(images, ArrayImages):
        return Subset(images, range(len(images)))
    places = {_in_class_folder(name): i for i, name in enumerate(images.names)}
    wanted = evaluation_images()
    chosen = [places[name] for name in wanted if name in places]
    if 0 < len(chosen) < len(wanted):
        _say_that_it_is_a_part(val, len(chosen), len(wanted))
    # a folder of other pictures under ImageNet's class names is taken whole
    return Subset(images, chosen or range(len(images)))


def _in_class_folder(name: str) -> str:
    return "/".join(name.split("/")[-2:])


@cache  # a stage may open its images more than once
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
        images, test_images = open_images(train), open_images(test)
        if (
            isinstance(images, FileImages)
            and isinstance(test_images, FileImages)
            and images.classes != test_images.classes
        ):
            differ = sorted(set(images.classes) ^ set(test_images.classes))
            raise DataError(
                f"{train.name} has {len(images.classes)} class folders and {test.name} {len(test_images.classes)}: "
                f"{', '.join(differ[:5])} {'are' if len(differ) > 1 else 'is'} in one of them only, "
                "and classes are numbered by their order",
                hint="give both parts the same class folders",
            )
        return images, test_images
    return open_images(path), None


def _find_part(path: Path, names: tuple[str, ...]) -> Path | None:
    for name in names:
        for suffix in ("", ".zip", ".npz"):
            if (candidate := path / f"{name}{suffix}").exists():
                return candidate
    return None
