"""Before a training begins: presets, what its settings leave open, its images, and what cannot go together."""

from typing import Any

import torch
from torch.utils.data import Subset

from ..data.facts import KNOWN_DATASETS
from ..data.splits import DataSet, Split, take_examples
from ..errors import ConfigError, DataError
from ..settings.training import TrainConfig
from ..settings.values import check_eps
from .operators import ramp_epochs

N_SELECTION = 1000
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},  # the defaults are the paper's, but for beta
    "short": {"epochs": 30, "schedule": "one-cycle", "lr": 0.2},
}


def with_preset(config: TrainConfig, sources: dict[str, str]) -> TrainConfig:
    """``config`` with its preset's values wherever neither a flag nor a file gave one; ``sources`` is kept in step."""
    update = {key: value for key, value in PRESETS[config.preset].items() if sources[key] == "default"}
    sources |= dict.fromkeys(update, f"preset {config.preset}")
    return config.model_copy(update=update)


def with_eps(config: TrainConfig) -> TrainConfig:
    """With the data set's own budget where none is given; refused beyond its limit."""
    facts = KNOWN_DATASETS.get(config.dataset)
    eps = config.eps or (facts.eps["Linf"] if facts else "8/255")
    check_eps(eps, "Linf")
    return config.model_copy(update={"eps": eps})


def splits_of(config: TrainConfig) -> tuple[Split, Split, Split]:
    """Training images, those that choose the best epoch, and test images."""
    data = DataSet(config.dataset, config.data_dir, order=config.class_order or "text")
    calibration, held_out, test = data.split("calibration"), data.split("held-out"), data.split("test")
    if config.paper_selection:  # nothing is held out
        whole = Subset(calibration.dataset, sorted([*calibration.indices, *held_out.indices]))
        return whole, take_examples(test, min(config.held_out_examples or len(test), len(test))), test
    n = min(config.held_out_examples or N_SELECTION, len(held_out))
    return calibration, take_examples(held_out, n), test


def check_settings(config: TrainConfig, device: str, *, fresh: bool) -> None:
    """What no single setting can tell, before an image is read."""
    if fresh and config.time_limit is not None:
        raise ConfigError(
            "--fresh with --time-limit: the same command, queued again, would begin anew each time",
            hint="remove the run folder once, and leave --fresh out",
        )
    if config.cuda_graphs and torch.device(device).type != "cuda":
        raise ConfigError(f"--cuda-graphs on {device}", hint="leave it out, or --device cuda")
    if config.mean_sparse_ramp is not None and config.mean_sparse_alpha is None:
        raise ConfigError("--mean-sparse-ramp without --mean-sparse-alpha", hint="--mean-sparse-alpha 0.2, say")
    ramp_epochs(config)


def check_sizes(config: TrainConfig, n_train: int, n_selection: int, n_workers: int = 1) -> None:
    """Batch normalisation has no variance in a batch of one, and no epoch is best without an image to choose by."""
    batch_size = min(config.batch_size, n_train)
    if batch_size < 2:
        raise ConfigError(
            f"a batch is of {config.batch_size} images out of {n_train}: batch normalisation needs two at least",
            hint="raise --batch-size" if n_train > 1 else "raise --n-examples",
        )
    if min(batch_size // 2, n_selection) < n_workers and n_workers > 1:
        raise ConfigError(
            f"{n_workers} workers share a batch of {batch_size} images and {n_selection} held-out ones: each needs two "
            "of a batch and one of these",
            hint="take fewer workers",
        )
    if not n_selection:
        raise DataError(
            f"{config.dataset} has so few training images that none is held out to choose the best epoch by",
            hint="give it 10 at least, or choose on test images: --paper-selection",
        )


def shorter_than_the_papers(config: TrainConfig) -> str:
    """What of a run's length falls short of the paper's, in words; "" where nothing does."""
    paper = TrainConfig()
    parts = [f"{config.epochs} epochs, not {paper.epochs}"] if config.epochs < paper.epochs else []
    if config.n_examples is not None:
        parts.append(f"{config.n_examples:,} images")
    if config.method != "standard" and config.n_steps < paper.n_steps:
        parts.append(f"{config.n_steps} attack steps, not {paper.n_steps}")
    return ", ".join(parts)
