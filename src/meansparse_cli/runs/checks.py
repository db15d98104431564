"""Whether the images of a stage and its model fit together, and what has to be said about a split."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.identity import image_ids
from ..data.splits import DataSet, Split, SplitName, check_images
from ..errors import DataError
from .context import RunContext


def check_model(context: RunContext, model: nn.Module, images: Split, batch: Tensor) -> int:
    """How many classes the model knows: as many as ``images`` have, whose size must be the model's.

    ``batch`` (n, channels, height, width) goes through the model, once. Raises DataError where that fails or does not
    fit.
    """
    shape = context.image_shape or tuple(batch.shape[1:])
    name = context.named_dataset
    check_images(images, images.dataset.n_classes, shape, name)  # type: ignore[attr-defined]
    n_classes = count_classes(model, batch)
    check_images(images, n_classes, shape, name)
    return n_classes


def count_classes(model: nn.Module, batch: Tensor) -> int:
    """How many logits the model gives an image; DataError where its forward pass fails or gives anything else."""
    with torch.no_grad():
        try:
            logits = model(batch)
        except Exception as error:  # the user's code may raise anything
            raise DataError(
                f"the model's forward pass fails on images of shape {tuple(batch.shape[1:])}: {error}",
                hint="does the data set's image size fit this model?",
            ) from error
    if logits.ndim != 2 or len(logits) != len(batch):
        raise DataError(f"the model gives {tuple(logits.shape)} for {len(batch)} images; expected (batch, classes)")
    return int(logits.shape[1])


def check_disjoint(context: RunContext) -> None:
    """Refuse held-out images that are among those of the statistics or of the test split.

    The splits of one data set are disjoint by construction; they need not be where the sweep was given another one.
    """
    config, before = context.config, context.calibrated_with
    if config.dataset is None and config.data_dir is None:
        return
    dataset = before["dataset"] or context.run.source.dataset
    data_dir = Path(before["data_dir"]) if before["data_dir"] else None
    held_out = context.split("held-out")
    if not len(held_out):
        raise DataError("the held-out split is empty", hint="a data set of 10 training images or more has one")
    if (context.named_dataset, config.data_dir or data_dir) == (dataset, data_dir):
        return  # its splits are disjoint files; pictures that a data set holds twice are its authors' affair
    mine, calibrated_with = image_ids(held_out), DataSet(dataset, data_dir)
    others: tuple[SplitName, SplitName] = ("calibration", "test")
    for split in others:
        n = len(mine & image_ids(calibrated_with.split(split)))
        if n:
            raise DataError(
                f"{n} of {len(held_out)} held-out images are in the {split} split that this run was calibrated with",
                hint="sweep on the data set of the statistics (leave out --dataset and --data-dir), or run: "
                f"{context.run.command('calibrate')} with the same --dataset and --data-dir",
            )


def split_note(split: SplitName) -> str | None:
    """What has to be said about accuracies on another split than the test split."""
    if split == "test":
        return None
    why = {
        "calibration": "training images, which the statistics were computed from",
        "held-out": "training images that sweep-alpha may have chosen alpha on",
    }[split]
    return f"NOT TEST IMAGES: accuracies on the {split} split, {why}"
