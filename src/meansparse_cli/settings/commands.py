"""The commands, once: what each is for, its settings, its other arguments, and its options as its help has them."""

from dataclasses import dataclass
from typing import Any

from . import arguments, stages
from .options import Arguments, Settings, StageArguments
from .training import TrainConfig


@dataclass(frozen=True)
class Command:
    """One command of ``meansparse``."""

    name: str
    help: str
    settings: type[Settings] = Settings
    options: str = ""
    """The fields of ``settings`` and ``arguments`` that are options, in the order of the help; else all arguments."""
    arguments: type[Arguments] = StageArguments
    is_stage: bool = False
    """One of those that ``run`` runs, in order."""
    has_section: bool = False
    """May a YAML file have a section of that name? A stage's it may."""


_MODEL = "model dataset data_dir preprocessing"
_TRUST = "threat weights allow_pickle"
_PLACE = "run config device"
_LAST = "seed batch_size workers fresh as_json"
_LAST_IN_BLOCKS = "seed batch_size block_size workers fresh as_json"

_COMMANDS = (
    Command(
        "fetch",
        "Get a model's weights, whole and checked.",
        stages.FetchConfig,
        "model dataset threat weights from_file allow_pickle norm run config fresh as_json",
        is_stage=True,
    ),
    Command(
        "sites",
        "Show a model's activations and which of them calibrate would use.",
        stages.CalibrateConfig,
        f"{_MODEL} {_TRUST} norm sites include_gates run config as_json",
        arguments.Sites,
    ),
    Command(
        "calibrate",
        "Learn each channel's mean and standard deviation in one pass.",
        stages.CalibrateConfig,
        f"{_MODEL} n_examples fraction estimator statistics sites include_gates {_TRUST} norm {_PLACE} {_LAST}",
        is_stage=True,
    ),
    Command(
        "sweep-alpha",
        "Choose alpha on the held-out split.",
        stages.SweepAlphaConfig,
        f"{_MODEL} n_examples alphas attack objective max_clean_drop min_gain alpha_rule sites centre spread racing "
        f"refine norm eps {_TRUST} {_PLACE} precision {_LAST_IN_BLOCKS}",
        is_stage=True,
    ),
    Command(
        "evaluate",
        "Measure base and sparsified model under attack, BPDA included.",
        stages.EvaluateConfig,
        f"{_MODEL} n_examples attack alpha sites centre spread individual norm eps split name {_TRUST} {_PLACE} "
        f"precision compile channels_last doubts n_doubt_examples pool save_witnesses shard {_LAST}",
        is_stage=True,
    ),
    Command(
        "measure",
        "Score many alphas, sites and eps on one split, plain and BPDA; choose nothing.",
        stages.MeasureConfig,
        f"{_MODEL} n_examples alphas sites attack centre spread norm eps split name {_TRUST} {_PLACE} precision "
        f"{_LAST_IN_BLOCKS}",
        has_section=True,
    ),
    Command(
        "plot",
        "Draw a sweep's curve; or, at its alpha or any other, what is blocked where, a channel before and after.",
        stages.PlotConfig,
        "run what site channel alpha dataset data_dir n_examples device batch_size seed",
    ),
    Command(
        "run",
        "All four stages. --n-examples and --attack are those of evaluate; a YAML file has a section for each stage.",
        stages.RunConfig,
        f"{_MODEL} n_examples fraction estimator sites include_gates alphas objective max_clean_drop min_gain "
        "alpha_rule racing refine centre spread attack individual doubts n_doubt_examples save_witnesses norm eps "
        f"threat weights from_file allow_pickle {_PLACE} precision compile channels_last {_LAST}",
    ),
    Command("table", "Put our cells beside those of a table of the paper.", arguments=arguments.Table),
    Command(
        "reproduce",
        "Make tables of the paper from nothing; goes on where it was killed.",
        arguments=arguments.Reproduce,
    ),
    Command(
        "export", "Write a run's sparsified model as one file, or its leaderboard card.", arguments=arguments.Export
    ),
    Command(
        "verify",
        "Judge adversarial images afresh, whoever made them.",
        stages.VerifyConfig,
        f"file {_MODEL} norm eps alpha sites centre spread split {_TRUST} {_PLACE} batch_size as_json",
        arguments.Verify,
    ),
    Command("report", "Show a run's reports again: tables, verdict, doubts, curves.", arguments=arguments.Report),
    Command("models", "List the zoo with its published figures, or check all of it.", arguments=arguments.Models),
    Command(
        "train",
        "Train a ResNet-18 (PGD, TRADES or standard) on the calibration split.",
        TrainConfig,
        "preset dataset data_dir n_examples held_out_examples test_examples method beta width activation eps n_steps "
        "step_size epochs batch_size schedule lr momentum weight_decay crop_padding flip ema paper_selection "
        "mean_sparse_alpha mean_sparse_ramp precision channels_last compile cuda_graphs time_limit save_dtype "
        f"{_PLACE} seed workers fresh as_json",
        has_section=True,
    ),
)
COMMANDS = {command.name: command for command in _COMMANDS}
STAGES = tuple(command.name for command in _COMMANDS if command.is_stage)
SECTIONS: dict[str, type[Any]] = {
    command.name: command.settings for command in _COMMANDS if command.is_stage or command.has_section
}
"""The sections that a YAML file may have."""
