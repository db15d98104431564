"""The three disjoint splits of a data set.

``calibration`` and ``held-out`` are disjoint parts of the training set, ``test`` is the test set. Which image falls
into which part depends on nothing but the number of training images, so every command sees the same splits.

A data set is a name (``digits``, ``cifar10``, ``cifar100``, ``imagenet``) or a path: an image folder (one folder a
class), a zip of one, an ``.npz``, or a folder that holds a ``train`` and a ``test`` of any of these.
"""

import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from ..errors import DataError
from .examples import in_words
from .folders import ClassOrder
from .imagenet import Preprocessing, class_numbers
from .open import open_dataset, open_imagenet, open_imagenet_test
from .pictures import is_grey
from .read import FileImages, ImageSet

log = logging.getLogger(__name__)

SplitName = Literal["calibration", "held-out", "test"]
Split = Subset[tuple[Tensor, int]]
"""Images of a data set, by their positions in its training or test set."""

HELD_OUT_FRACTION, HELD_OUT_AT_MOST = 0.1, 5000
SPLIT_SEED = 2406_05927


class DataSet:
    """A data set by its name or path, opened once, and its splits, each in a fixed order.

    ``preprocessing`` is the model's, for ImageNet by its name; bicubic to 256, centre of 224 when not given.
    ``channels`` says how many the model takes, ``order`` how class folders are numbered.
    """

    def __init__(
        self,
        dataset: str,
        data_dir: Path | None,
        preprocessing: Preprocessing | None = None,
        *,
        channels: Callable[[], int | None] = lambda: None,
        order: ClassOrder = "text",
    ) -> None:
        self.dataset, self.data_dir, self.preprocessing = dataset, data_dir, preprocessing or Preprocessing()
        self.channels, self.order = channels, order
        self._splits: dict[SplitName, Split] = {}

    def split(self, name: SplitName) -> Split:
        """The images of one split; what it does not need is not opened."""
        if name not in self._splits:
            self._splits[name] = self._cut_imagenet(name) if self.dataset == "imagenet" else self._cut(name)
            source = self._splits[name].dataset
            if isinstance(source, FileImages) and source.preprocessing is None:
                source.channels = 1 if is_grey(source.store.read(0), source.names[0]) and self.channels() == 1 else 3
        return self._splits[name]

    @cached_property
    def _parts(self) -> tuple[ImageSet, ImageSet | None]:
        return open_dataset(self.dataset, self.data_dir, self.order)

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
    """Refuse images that the model cannot mean: wrong shape, or more classes than it has logits."""
    if not len(images):
        raise DataError(f"{where} is empty")
    shape = tuple(images[0][0].shape)
    if shape != tuple(image_shape):
        turned = sorted(shape) == sorted(image_shape)
        raise DataError(
            f"{where}: images are {in_words(shape)}, the model expects {in_words(image_shape)}",
            hint="an array of images is (n, height, width, channels): transpose it"
            if turned
            else "bring the images to that size, or name another data set: --dataset NAME or PATH",
        )
    found: int = images.dataset.n_classes  # type: ignore[attr-defined]
    if found > n_classes:
        raise DataError(
            f"{where}: {found} classes were found, the model has {n_classes}",
            hint="each class needs a logit of its own: another --dataset, or another model",
        )
    if found < n_classes:
        log.warning(
            f"{where}: {found} classes were found, the model has {n_classes} logits: class k is logit k, "
            f"an attack may end at any of the others too{_wordnet_hint(images)}"
        )


def _wordnet_hint(images: Split) -> str:
    """Folders of ImageNet's classes, numbered by their own order, are not what a model of ImageNet means."""
    named = set(getattr(images.dataset, "classes", ()))
    if not named or not named <= class_numbers().keys() or len(named) == len(class_numbers()):
        return ""
    return "; these are WordNet ids: --dataset imagenet --data-dir DIR numbers them as ImageNet does"


def _permutation(n: int) -> list[int]:
    return np.random.default_rng(SPLIT_SEED).permutation(n).tolist()
