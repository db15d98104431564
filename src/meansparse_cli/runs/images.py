"""The images a stage reads, and whether they and the model fit together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from ..settings.stages import AttackConfig, StageConfig, SweepAlphaConfig
from .folder import Run
from .report import read_report

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Subset

    from ..data.datasets import SplitName
    from ..settings.shard import Shard


def load_images(run: Run, config: StageConfig, split: SplitName) -> Subset[tuple[Tensor, int]]:
    """The images of a split: of the data set of the settings, of calibrate's, or of the model's, in that order."""
    from ..data.datasets import load_split
    from ..models.source import kind_of

    dataset, data_dir, named = config.dataset, config.data_dir, config.preprocessing
    if (before := _calibrated_with(run, config)) is not None:
        # what calibrate read is what the later stages mean, unless they say otherwise
        dataset = dataset or before["dataset"]
        data_dir = data_dir or (Path(before["data_dir"]) if before["data_dir"] else None)
        named = named or before.get("preprocessing")
    preprocessing = kind_of(run.source).preprocessing(named)
    return load_split(dataset or run.source.dataset, data_dir, split, preprocessing)


def _calibrated_with(run: Run, config: StageConfig) -> dict[str, Any] | None:
    """The settings of calibrate, for the stages after it."""
    path = run.paths.report("calibrate")
    if not isinstance(config, AttackConfig) or not path.exists():
        return None
    settings: dict[str, Any] = read_report(path, "calibrate", mend=run.command("calibrate"))["config"]["settings"]
    return settings


def image_shape(run: Run, config: StageConfig) -> tuple[int, int, int] | None:
    """(channels, height, width) of the images that the model is given; None for a data set nobody knows."""
    from ..data.datasets import KNOWN_DATASETS
    from ..models.source import kind_of

    named = config.preprocessing or (_calibrated_with(run, config) or {}).get("preprocessing")
    if (preprocessing := kind_of(run.source).preprocessing(named)) is not None:
        return 3, preprocessing.size, preprocessing.size
    facts = KNOWN_DATASETS.get(run.source.dataset)
    return facts.image_shape if facts is not None else None


def examples(
    run: Run, config: StageConfig, split: SplitName, n: int | None, *, clamp: bool = False, shard: Shard | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions in the data set, images and labels of the first n of a split's seeded order, or of a shard of these."""
    import torch

    from ..data.datasets import stack_examples

    images = load_images(run, config, split)
    if clamp and n is not None and n > len(images):
        n = len(images)
    chosen = _take(images, config, split, n, shard)
    x, y = stack_examples(chosen, config.workers)
    return torch.tensor(list(chosen.indices)), x, y


def images_id(run: Run, config: StageConfig, split: SplitName, n: int | None, shard: Shard | None = None) -> str:
    """A digest of the images that ``examples`` takes, and their labels."""
    from ..data.datasets import content_id

    return content_id(_take(load_images(run, config, split), config, split, n, shard))


def _take(
    images: Subset[tuple[Tensor, int]], config: StageConfig, split: SplitName, n: int | None, shard: Shard | None
) -> Subset[tuple[Tensor, int]]:
    from torch.utils.data import Subset

    from ..data.datasets import take_examples

    chosen = take_examples(images, n, seed=config.seed)
    if not len(chosen):
        raise DataError(f"the {split} split is empty")
    if shard is None:
        return chosen
    if len(chosen) < shard.count:
        raise ConfigError(f"{len(chosen)} examples cannot be shared by {shard.count} shards")
    return Subset(chosen.dataset, [chosen.indices[i] for i in shard.positions(len(chosen))])


def check_disjoint(run: Run, config: SweepAlphaConfig) -> None:
    """Refuse held-out images that are among those of the statistics or of the test split.

    The splits of one data set are disjoint by construction; they need not be where the sweep was given another one.
    """
    from ..data.datasets import image_ids, load_split

    if config.dataset is None and config.data_dir is None:
        return
    before = _calibrated_with(run, config)
    assert before is not None  # sweep-alpha has verified calibrate's report
    dataset, data_dir = before["dataset"] or run.source.dataset, before["data_dir"] and Path(before["data_dir"])
    held_out = load_images(run, config, "held-out")
    if not len(held_out):
        raise DataError("the held-out split is empty", hint="a data set of 10 training images or more has one")
    same_source = (config.dataset or run.source.dataset, config.data_dir or data_dir) == (dataset, data_dir)
    if same_source:
        return  # its splits are disjoint files; pictures that a data set holds twice are its authors' affair
    mine = image_ids(held_out)
    for split in ("calibration", "test"):
        n = len(mine & image_ids(load_split(dataset, data_dir, split)))  # type: ignore[arg-type]
        if n:
            raise DataError(
                f"{n} of {len(held_out)} held-out images are in the {split} split that this run was calibrated with",
                hint=f"sweep on the data set of the statistics (leave out --dataset and --data-dir), or run: {run.command('calibrate')} "
                "with the same --dataset and --data-dir",
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


def check_data(model: nn.Module, run: Run, config: StageConfig, images: Any, batch: Tensor) -> None:
    """Refuse images whose size or whose number of classes is not the model's."""
    from ..data.datasets import check_images

    shape = image_shape(run, config) or tuple(batch.shape[1:])
    name = config.dataset or run.source.dataset
    check_images(images, images.dataset.n_classes, shape, name)
    check_images(images, count_classes(model, batch), shape, name)


def check_logits(model: nn.Module, run: Run, config: StageConfig, batch: Tensor) -> None:
    """The same for the test split, which the stages after calibrate may be the first to open."""
    check_data(model, run, config, load_images(run, config, "test"), batch)


def count_classes(model: nn.Module, batch: Tensor) -> int:
    """How many logits the model gives an image; DataError where its forward pass fails or gives anything else."""
    import torch

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
