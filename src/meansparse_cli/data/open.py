"""From the name of a data set, or a path, to its training and its test images."""

import logging
from pathlib import Path

import numpy as np

from ..errors import DataError
from .facts import KNOWN_DATASETS
from .imagenet import Preprocessing, evaluation_images
from .read import ArrayImages, FileImages, ImageSet, open_images

log = logging.getLogger(__name__)

TEST_NAMES = ("test", "val", "validation")


def open_dataset(dataset: str, data_dir: Path | None) -> tuple[ImageSet, ImageSet | None]:
    """Training and test images; None for the latter where one unnamed set is all there is. Not for ImageNet."""
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


def open_imagenet_train(data_dir: Path | None, preprocessing: Preprocessing) -> ImageSet:
    """``train``, which may be over a million files."""
    data_dir = _check_folder("imagenet", data_dir)
    if (train := _find_part(data_dir, ("train",))) is None:
        raise DataError(f"no train in {data_dir}", hint=f"--data-dir takes a folder with {_layouts('imagenet')}")
    return open_images(train, preprocessing)


def open_imagenet_test(data_dir: Path | None, preprocessing: Preprocessing) -> tuple[ImageSet, list[int]]:
    """``val``, and where RobustBench's 5,000 images are in it, in its order; those of them that are there."""
    data_dir = _check_folder("imagenet", data_dir)
    if (val := _find_part(data_dir, ("val", "validation", "test"))) is None:
        raise DataError(f"no val in {data_dir}", hint=f"--data-dir takes a folder with {_layouts('imagenet')}")
    images = open_images(val, preprocessing)
    if isinstance(images, ArrayImages):
        return images, list(range(len(images)))
    places = {"/".join(name.split("/")[-2:]): i for i, name in enumerate(images.names)}
    wanted = evaluation_images()
    chosen = [places[name] for name in wanted if name in places]
    if 0 < len(chosen) < len(wanted):
        log.warning(
            f"imagenet: {val} has {len(chosen):,} of RobustBench's {len(wanted):,} validation images: "
            "these are the test split"
        )
    # a folder of other pictures under ImageNet's class names is taken whole
    return images, chosen or list(range(len(images)))


def _check_folder(dataset: str, data_dir: Path | None) -> Path:
    if data_dir is None:
        raise DataError(
            f"{dataset} needs a folder", hint=f"name it: --data-dir DIR ({_layouts(dataset)}), or set MEANSPARSE_DATA"
        )
    if not data_dir.is_dir():
        raise DataError(f"no folder {data_dir}", hint=f"--data-dir takes a folder with {_layouts(dataset)}")
    return data_dir


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
