"""The three disjoint splits of a data set.

``calibration`` and ``held-out`` are disjoint parts of the training set, ``test`` is the test set. Which image falls
into which part depends on nothing but the number of training images, so every command sees the same splits.

A data set is a name (``digits``, ``cifar10``, ``cifar100``, ``imagenet``) or a path: an image folder (one folder a
class), a zip of one, an ``.npz``, or a folder that holds a ``train`` and a ``test`` of any of these.
"""

from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from ..errors import DataError
from .class_folders import ClassOrder
from .examples import in_words
from .imagenet import Preprocessing
from .open import open_dataset, open_imagenet, open_imagenet_test
from .read import ImageSet

SplitName = Literal["calibration", "held-out", "test"]
Split = Subset[tuple[Tensor, int]]
"""Images of a data set, by their positions in its training or test set."""

HELD_OUT_FRACTION, HELD_OUT_AT_MOST = 0.1, 5000
SPLIT_SEED = 2406_05927


class DataSet:
    """A data set by its name or path, opened once, and its splits, each in a fixed order.

    ``preprocessing`` is the model's, for ImageNet by its name; bicubic to 256, centre of 224 when not given.
    """

    def __init__(
        self,
        dataset: str,
        data_dir: Path | None,
        preprocessing: Preprocessing | None = None,
        class_order: ClassOrder | None = None,
    ) -> None:
        self.dataset, self.data_dir, self.preprocessing = dataset, data_dir, preprocessing or Preprocessing()
        self.class_order = class_order
        self._splits: dict[SplitName, Split] = {}

    def split(self, name: SplitName) -> Split:
        """The images of one split; what it does not need is not opened."""
        if name not in self._splits:
            self._splits[name] = self._cut_imagenet(name) if self.dataset == "imagenet" else self._cut(name)
        return self._splits[name]

    @property
    def notes(self) -> list[str]:
        """What a reader of the results must know of the images that were opened."""
        return list(dict.fromkeys(note for split in self._splits.values() for note in split.dataset.notes))  # type: ignore[attr-defined]

    @cached_property
    def _parts(self) -> tuple[ImageSet, ImageSet | None]:
        return open_dataset(self.dataset, self.data_dir, self.class_order)

    @cached_property
    def _imagenet_train(self) -> ImageSet:
        return open_imagenet("train", self.data_dir, self.preprocessing)

    def _cut(self, name: SplitName) -> Split:
        train, test = self._parts
        if test is None:
            # one unnamed set: it is cut 80 / 10 / 10, always in the same way
            order = _permutation(len(train))
            n_part = max(1, len(train) // 10)
            parts = {"test": order[:n_part], "held-out": order[n_part : 2 * n_part], "calibration": order[2 * n_part :]}
            return Subset(train, sorted(parts[name]))
        return Subset(test, range(len(test))) if name == "test" else _part_of_training(train, name)

    def _cut_imagenet(self, name: SplitName) -> Split:
        if name == "test":
            return Subset(*open_imagenet_test(self.data_dir, self.preprocessing))
        return _part_of_training(self._imagenet_train, name)


def load_split(
    dataset: str, data_dir: Path | None, split: SplitName, preprocessing: Preprocessing | None = None
) -> Split:
    """One split of a ``DataSet``."""
    return DataSet(dataset, data_dir, preprocessing).split(split)


def _part_of_training(train: ImageSet, split: SplitName) -> Split:
    order = _permutation(len(train))
    n_held_out = min(HELD_OUT_AT_MOST, int(len(train) * HELD_OUT_FRACTION))
    return Subset(train, sorted(order[:n_held_out] if split == "held-out" else order[n_held_out:]))


def take_examples(images: Split, n_examples: int | None, *, seed: int = 0) -> Split:
    """The first ``n_examples`` of a seeded shuffle, so that a larger number contains every smaller one."""
    wanted = len(images) if n_examples is None else n_examples
    if wanted > len(images):
        raise DataError(f"{wanted} examples were asked for, the split has {len(images)}")
    order = np.random.default_rng([SPLIT_SEED, seed]).permutation(len(images))
    return Subset(images.dataset, [images.indices[i] for i in order[:wanted]])


def check_images(images: Split, n_classes: int, image_shape: tuple[int, ...], where: str) -> None:
    """Refuse images that the model cannot mean: of a wrong shape, or of more classes than it has logits.

    Fewer are noted: a network may have a logit for none of them, as for what is to be rejected.
    """
    if not len(images):
        raise DataError(f"{where} is empty")
    shape = tuple(images[0][0].shape)
    if shape != tuple(image_shape):
        raise DataError(f"{where}: images are {in_words(shape)}, the model expects {in_words(image_shape)}")
    found: int = images.dataset.n_classes  # type: ignore[attr-defined]
    if found > n_classes:
        raise DataError(f"{where}: {found} classes were found, the model has {n_classes}")
    if found < n_classes:
        images.dataset.note(  # type: ignore[attr-defined]
            f"{where}: the model has {n_classes} logits, the images are of {found} classes, numbered 0 to {found - 1}"
        )


def _permutation(n: int) -> list[int]:
    return np.random.default_rng(SPLIT_SEED).permutation(n).tolist()
