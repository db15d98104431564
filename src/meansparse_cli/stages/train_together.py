"""``meansparse train`` by several workers: they share each batch, and the first one writes."""

import os
from functools import partial
from pathlib import Path

import torch

from ..errors import ConfigError
from ..runs.folder import run_folder_lock
from ..settings.arguments import TrainArguments
from ..settings.training import TrainConfig
from .train import REPORT, train, train_folder
from .workers import as_local_ranks, met, n_jobs, quiet, rank_here, refuse_fresh_plan


def train_together(config: TrainConfig, sources: dict[str, str], given: TrainArguments) -> Path | None:
    """``train`` by as many workers as are asked for, which share each batch; None, too, on all ranks but the first."""
    jobs = n_jobs(given, config.device, rank := rank_here())
    if config.plan:
        refuse_fresh_plan(given)
        return None if rank and rank.number > 0 else train(config, sources)
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    n = rank.world if rank else jobs or 1
    if n > 1 and config.batch_size < 2 * n:
        raise ConfigError(f"{n} workers share a batch of {config.batch_size} images: each needs two", hint="take fewer")
    n_here = int(os.environ.get("LOCAL_WORLD_SIZE", n)) if rank else n
    if on_gpu and n_here > 1 and (n_here > torch.cuda.device_count() or config.device.startswith("cuda:")):
        raise ConfigError(
            f"{n_here} workers on {torch.cuda.device_count()} GPUs: in training each needs one of its own",
            hint="--devices all; or --device cpu",
        )
    if rank and rank.number > 0:
        return _train_as_rank(config, sources, given.fresh, on_gpu)
    with run_folder_lock(folder := train_folder(config)):
        if rank and rank.world > 1:
            return _train_as_rank(config, sources, given.fresh, on_gpu)
        if not jobs or jobs == 1:
            return train(config, sources, fresh=given.fresh)
        as_local_ranks(jobs, partial(_train_as_rank, config, sources, given.fresh, on_gpu), on_gpu=on_gpu)
        return folder / REPORT if (folder / REPORT).exists() else None


def _train_as_rank(
    config: TrainConfig, sources: dict[str, str], fresh: bool, on_gpu: bool, shard: str = ""
) -> Path | None:
    """``train`` as one of several ranks, whose number is in the environment; ``shard`` is what a worker is told."""
    rank = rank_here()
    assert rank is not None
    with met(rank, "cpu:gloo,cuda:nccl" if on_gpu else "gloo"), quiet(rank.number > 0):
        return train(config, sources, fresh=fresh)
