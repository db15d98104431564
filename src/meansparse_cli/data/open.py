"""From the name of a data set, or a path, to its training and its test images."""

import difflib
import logging
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..foreign import reading
from .facts import KNOWN_DATASETS
from .folders import ClassOrder
from .imagenet import Preprocessing, evaluation_images
from .read import ArrayImages, FileImages, ImageSet, open_images
from .stores import shards_in, shards_of

log = logging.getLogger(__name__)

TEST_NAMES = ("test", "val", "validation")
LAYOUTS = {
    "imagenet": "train and val, in each a folder a class named by its WordNet id, or as tars or Parquet files",
    "other": "train and test (or val) as image folders, zips, .npz, tars or Parquet files",
}
LAYOUTS |= {name: f"torchvision's {name} files, or {LAYOUTS['other']}" for name in ("cifar10", "cifar100")}
"""What ``--data-dir`` takes."""


def open_dataset(dataset: str, data_dir: Path | None, order: ClassOrder = "text") -> tuple[ImageSet, ImageSet | None]:
    """Training and test images; None for the latter where one unnamed set is all there is. Not for ImageNet."""
    if dataset == "digits":
        return _open_digits()
    if dataset in KNOWN_DATASETS:
        data_dir = _check_folder(dataset, data_dir)
        try:
            return _open_torchvision_cifar(dataset, data_dir) or _open_path(data_dir, order)
        except DataError as error:
            if (inside := data_dir / dataset).is_dir():
                error.hint = f"is it the folder in it? --data-dir {inside}"
            raise
    path = Path(dataset)
    if not path.exists():
        known = ", ".join(KNOWN_DATASETS)
        near = difflib.get_close_matches(dataset, KNOWN_DATASETS, n=1)
        raise DataError(
            f"no data set {dataset!r}: no such path, and not one of {known}",
            hint=f"did you mean --dataset {near[0]}?" if near else None,
        )
    return _open_path(path, order)


def open_imagenet(part: str, data_dir: Path | None, preprocessing: Preprocessing) -> ImageSet:
    """``train``, which may be over a million files, or ``val``."""
    data_dir = _check_folder("imagenet", data_dir)
    path = _find_part(data_dir, "train") if part == "train" else _find_part(data_dir, "val", "validation", "test")
    if path is None:
        raise DataError(f"no {part} in {data_dir}", hint=f"--data-dir takes a folder with {LAYOUTS['imagenet']}")
    return open_images(path, preprocessing)


def open_imagenet_test(data_dir: Path | None, preprocessing: Preprocessing) -> tuple[ImageSet, list[int]]:
    """``val``, and where RobustBench's 5,000 images are in it, in its order; those of them that are there."""
    images = open_imagenet("val", data_dir, preprocessing)
    chosen: list[int] = []
    if isinstance(images, FileImages):
        places = {_validation_id(name): i for i, name in enumerate(images.names)}
        wanted = evaluation_images()
        chosen = [places[one] for one in map(_validation_id, wanted) if one in places]
        if 0 < len(chosen) < len(wanted):
            log.warning(
                f"imagenet: {images.source} has {len(chosen):,} of RobustBench's {len(wanted):,} validation images: "
                "these are the test split"
            )
    # a folder of other pictures under ImageNet's class names is taken whole
    return images, chosen or list(range(len(images)))


def _validation_id(name: str) -> str:
    """What tells a validation image of ImageNet, in whatever file it lies: ``ILSVRC2012_val_00000293``."""
    found = re.search(r"ILSVRC2012_val_\d{8}", name)
    return found[0] if found else name


def _check_folder(dataset: str, data_dir: Path | None) -> Path:
    layouts = LAYOUTS[dataset]
    if data_dir is None:
        raise DataError(
            f"{dataset} needs a folder", hint=f"name it: --data-dir DIR ({layouts}), or set MEANSPARSE_DATA"
        )
    if not data_dir.is_dir():
        if data_dir.is_file():
            raise DataError(f"{data_dir} is a file", hint=f"as a data set: --dataset {data_dir}")
        raise DataError(f"no folder {data_dir}", hint=f"--data-dir takes a folder with {layouts}")
    return data_dir


def _open_digits() -> tuple[ImageSet, ImageSet]:
    """scikit-learn's 1,797 digits (8 x 8, 16 grey levels scaled to 0..240); every fifth image is the test set."""
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None
    # the file itself: to import what loads it takes a second of every command
    table = np.loadtxt(Path(package.origin).with_name("datasets") / "data" / "digits.csv.gz", np.uint8, delimiter=",")
    x, y = 15 * table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    is_test = np.arange(len(y)) % 5 == 4
    train = ArrayImages(x[~is_test], y[~is_test], source="digits")
    return train, ArrayImages(x[is_test], y[is_test], source="digits")


def _open_torchvision_cifar(dataset: str, data_dir: Path) -> tuple[ImageSet, ImageSet] | None:
    from torchvision.datasets import CIFAR10, CIFAR100

    cls = CIFAR10 if dataset == "cifar10" else CIFAR100
    if not (data_dir / cls.base_folder).is_dir():
        return None
    with reading(DataError, f"{data_dir / cls.base_folder}"):
        train, test = (cls(str(data_dir), train=is_train, download=False) for is_train in (True, False))
    images = [ArrayImages(part.data, np.asarray(part.targets), source=str(data_dir)) for part in (train, test)]
    return images[0], images[1]


def _open_path(path: Path, order: ClassOrder) -> tuple[ImageSet, ImageSet | None]:
    if not path.is_dir() or (train := _find_part(path, "train")) is None:
        return open_images(path, order=order), None
    if (test := _find_part(path, *TEST_NAMES)) is None:
        raise DataError(
            f"{path} holds {(train if isinstance(train, Path) else train[0]).name} but no test set",
            hint=f"expected one of {', '.join(TEST_NAMES)}",
        )
    images, test_images = open_images(train, order=order), open_images(test, order=order)
    if isinstance(images, FileImages) and isinstance(test_images, FileImages):
        if images.store.is_numbered and test_images.store.is_numbered:
            images.n_classes = test_images.n_classes = max(images.n_classes, test_images.n_classes)
        else:
            _number_as(images, test_images)
    return images, test_images


def _number_as(train: FileImages, test: FileImages) -> None:
    """Give the test part the classes of the training part, which may be more."""
    names = (train.source.name, test.source.name)
    if unknown := sorted(set(test.classes) - set(train.classes)):
        raise DataError(
            f"{names[0]} has {train.n_classes} class folders and {names[1]} {test.n_classes}: "
            f"{', '.join(unknown[:5])} {'are' if len(unknown) > 1 else 'is'} in {names[1]} only, "
            "and classes are numbered by their order",
            hint="give both parts the same class folders",
        )
    if absent := [name for name in train.classes if name not in set(test.classes)]:
        some = f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}"
        log.warning(f"{test.source}: no pictures of {len(absent)} of {train.n_classes} classes: {some}")
        test.number_classes({name: number for number, name in enumerate(train.classes)})


def _find_part(path: Path, *names: str) -> Path | list[Path] | None:
    """A folder, a zip or an ``.npz`` of one of ``names``, or its tars or Parquet files."""
    candidates = (path / f"{name}{suffix}" for name in names for suffix in ("", ".zip", ".npz"))
    found = next((candidate for candidate in candidates if candidate.exists()), None)
    if found is None or (found.is_dir() and not any(part.is_dir() for part in found.iterdir())):
        shards = shards_of(path, *names) or ([] if found is None else shards_in(found))
        return shards or found
    return found
