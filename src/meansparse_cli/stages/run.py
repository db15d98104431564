"""The stages by their commands, one at a time or ``meansparse run``: all four."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..attacks import expand_attacks
from ..data.splits import DataSet, Split, SplitName, take_examples
from ..engine.image_files import read_images
from ..errors import ConfigError, DataError
from ..models.source import kind_of
from ..reporting.console import phase
from ..runs.device import pick_device
from ..runs.folder import Run, locate_run, lock_for, places_in
from ..runs.report import RunPaths
from ..selection.search import check_blocks
from ..selection.sweep import families_of
from ..settings.arguments import SharedArguments, StageArguments
from ..settings.commands import COMMANDS, SECTIONS, STAGES
from ..settings.resolve import resolve
from ..settings.shard import shard_here
from ..settings.stages import CalibrateConfig, EvaluateConfig, FetchConfig, StageConfig, SweepAlphaConfig
from ..settings.values import eps_for
from .calibrate import chosen_images
from .fetch import ensure_fetched
from .gather import begin_anew
from .workers import Rank, as_ranks, in_processes, n_jobs, rank_here, refuse_fresh_plan

OF_EVALUATE = ("n_examples", "attack")
"""Options of ``run`` that mean the last stage alone."""


@dataclass(frozen=True)
class Stage:
    """One stage as it is asked for; ``sources``: where each of ``settings`` is from."""

    command: str
    settings: Any
    sources: dict[str, str]

    def do(self, *, fresh: bool = False, **settings: Any) -> Path | None:
        """Do it with its run folder locked, with other ``settings`` than it was asked for; the report's path."""
        config = self.settings.model_copy(update=settings)
        with lock_for(config):
            return _function(self.command)(config, self.sources, fresh=fresh)

    def do_shard(self, shard: str) -> None:
        self.do(shard=shard)

    def prepare(self, *, fresh: bool) -> None:
        """What has to be there before several workers begin, and what must not."""
        with lock_for(self.settings):
            if self.command in ("calibrate", "verify"):
                ensure_fetched(self.settings, self.sources)
            if fresh:
                run = locate_run(self.settings)
                whole, _ = places_in(run.paths.folder, self.settings)
                begin_anew(Run(run.source, RunPaths(whole), run.norm), self.command)


def run_stage(command: str, flags: dict[str, Any], given: StageArguments) -> Path | None:
    """Resolve the settings of a stage and do it, with as many workers as there are; the report's path.

    None on a rank of ``torchrun`` that is not the first.
    """
    settings: Any
    settings, sources = resolve(command, COMMANDS[command].settings, given.config, flags)
    stage, rank = Stage(command, settings, sources), rank_here()
    if not issubclass(COMMANDS[command].arguments, SharedArguments):
        refuse_ranks(rank, command)
        return stage.do(fresh=given.fresh)
    assert isinstance(given, SharedArguments)
    if settings.plan:
        refuse_fresh_plan(given)
        return None if rank and rank.number > 0 else stage.do()
    jobs = n_jobs(given, settings.device, rank)
    if rank and settings.shard == f"{rank.number + 1}/{rank.world}":  # --shard auto
        stage, settings = Stage(command, no_shard := settings.model_copy(update={"shard": None}), sources), no_shard
    if rank and settings.shard is not None and settings.shard == shard_here():
        return stage.do(fresh=given.fresh)  # an array of such jobs, numbered through
    if settings.shard is not None and (rank or jobs):
        raise ConfigError(
            f"--shard {settings.shard} with {'torchrun' if rank else '--jobs'}, which deals out shards itself",
            hint="leave --shard out",
        )
    prepare, gather = partial(stage.prepare, fresh=given.fresh), partial(stage.do, finish=True)
    if rank:
        return as_ranks(rank, stage.do_shard, prepare, gather)
    if jobs:
        if command == "evaluate" and settings.n_examples is not None and settings.n_examples < jobs:
            raise ConfigError(f"--jobs {jobs}: {settings.n_examples} examples cannot be shared by so many")
        prepare()
        in_processes(jobs, stage.do_shard, on_gpu=settings.device != "cpu" and torch.cuda.is_available())
        return gather()
    return stage.do(fresh=given.fresh)


def refuse_ranks(rank: Rank | None, command: str) -> None:
    """Refuse a command that would be done by each of several ranks."""
    if rank is not None and rank.world > 1:
        shared = [name for name, one in COMMANDS.items() if one.is_shared]
        raise ConfigError(
            f"{command} under torchrun with {rank.world} workers: each would do all of it",
            hint=f"run it by itself; {', '.join(shared)} share their work",
        )


def run_all(flags: dict[str, Any], *, file: Path | None, fresh: bool) -> Path:
    """All four stages, with their run folder locked from first to last; the path of the last one's report."""
    refuse_ranks(rank_here(), "run")
    of_all = {key: value for key, value in flags.items() if key not in OF_EVALUATE}
    asked = {c: resolve(c, SECTIONS[c], file, flags if c == STAGES[-1] else of_all) for c in STAGES}
    run = locate_run(asked["fetch"][0])
    folder, path = run.paths.folder, Path()
    with lock_for(asked["fetch"][0]):
        check_all(run, *(config for config, _ in asked.values()))
        for command, (config, sources) in asked.items():
            here = config.model_copy(update={"run": folder})
            with lock_for(here, held=folder), phase(command):
                path = _function(command)(here, sources, fresh=fresh)
    return path


def check_all(
    run: Run, fetch: FetchConfig, calibrate: CalibrateConfig, sweep: SweepAlphaConfig, evaluate: EvaluateConfig
) -> None:
    """Raise what a stage would raise about its attacks, budget, device, data set or number of images."""
    families_of(sweep.attack, sweep.objective)
    expand_attacks(evaluate.attack)
    for attacked in (sweep, evaluate):
        eps_for(attacked.eps, run.source.dataset, attacked.norm or run.norm)
    for stage in (calibrate, sweep, evaluate):
        pick_device(stage.device)
    for file in evaluate.pool:
        read_images(file)

    def split(config: StageConfig, name: SplitName) -> Split:
        dataset = config.dataset or calibrate.dataset or run.source.dataset
        named = config.preprocessing or calibrate.preprocessing
        data_dir, preprocessing = config.data_dir or calibrate.data_dir, kind_of(run.source).preprocessing(named)
        images = DataSet(dataset, data_dir, preprocessing).split(name)
        if not len(images):
            raise DataError(f"the {name} split is empty", hint="is this the folder of a data set? --data-dir DIR")
        return images

    if calibrate.statistics == "measured":
        chosen_images(calibrate, split(calibrate, "calibration"))
    held_out = split(sweep, "held-out")
    is_given = "n_examples" in sweep.model_fields_set
    n = sweep.n_examples if is_given else min(sweep.n_examples or len(held_out), len(held_out))
    n_swept = len(take_examples(held_out, n))
    if sweep.alpha_rule != "shared":
        check_blocks(n_swept, sweep.block_size)
    take_examples(split(evaluate, evaluate.split), evaluate.n_examples)


def _function(command: str) -> Callable[..., Path]:
    name = command.replace("-", "_")
    return getattr(import_module(f".{name}", __package__), name)  # type: ignore[no-any-return]
