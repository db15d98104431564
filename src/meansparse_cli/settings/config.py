"""Settings: one frozen model a command; YAML and flags become one of these, in ``resolve``.

Flags win over the YAML file, which wins over the default. In a YAML file a key at the top applies to every command that
has it; a section named after a command (``sweep-alpha: {n_examples: 500}``) applies to that command alone and wins.
"""

from __future__ import annotations

import difflib
import math
import os
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..errors import ConfigError
from ..sites.rules import parse_rule
from .shard import parse_shard

MOST_IN_A_GRID = 1000


def parse_eps(value: object) -> str:
    """``8/255`` or ``0.03`` -> the text itself, once it is known to be a positive number."""
    text = str(value).strip()
    try:
        number = Fraction(text)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"eps is {text!r}; expected a number or a fraction such as 8/255") from error
    if number <= 0:
        raise ValueError(f"eps is {text}; it must be above 0")
    return text


def eps_value(text: str) -> float:
    """The number behind ``8/255``."""
    return float(Fraction(text))


def eps_text(value: float) -> str:
    """A budget as people write it: ``8/255`` where it is a multiple of 1/255.

    >>> eps_text(8 / 255), eps_text(0.5)
    ('8/255', '0.5')
    """
    levels = round(255 * value)
    return f"{levels}/255" if levels / 255 == value else f"{value:.12g}"


def parse_eps_grid(value: object) -> str:
    """One eps, ``2/255,8/255``, ``1/255:16/255:1/255`` (from, to, step; ends included) or a list -> the text itself."""
    text = ",".join(str(part) for part in value) if isinstance(value, list | tuple) else str(value).strip()
    for eps in eps_grid(text):
        parse_eps(eps)
    return text


def eps_grid(text: str) -> tuple[str, ...]:
    """Every eps that the text means, ascending, each once, as it would be written."""
    if ":" not in text:
        parts = [parse_eps(part) for part in text.split(",") if part.strip()]
        if not parts:
            raise ValueError("the list of eps is empty")
        return tuple(sorted(dict.fromkeys(parts), key=Fraction))
    try:
        first, last, step = (Fraction(part) for part in text.split(":"))
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"eps is {text!r}; expected FROM:TO:STEP such as 1/255:16/255:1/255") from error
    if step <= 0 or last < first:
        raise ValueError(f"eps {text!r} is an empty range: FROM must not exceed TO, and STEP must be above 0")
    if (n := int((last - first) / step) + 1) > MOST_IN_A_GRID:
        raise ValueError(f"eps {text!r} are {n:,} values, more than {MOST_IN_A_GRID:,}")
    written_over = {part.partition("/")[2] for part in text.split(":")} - {""}
    values = [first + i * step for i in range(n)]
    over = int(written_over.pop()) if len(written_over) == 1 else None
    if over is not None and all((value * over).denominator == 1 for value in values):
        return tuple(f"{value * over}/{over}" for value in values)
    return tuple(f"{float(value):.12g}" for value in values)


def check_eps(text: str, norm: str) -> None:
    """Refuse a budget that covers the whole image, the usual sign of pixel units 0..255."""
    limit = {"Linf": 1.0, "L2": 8.0}[norm]
    if eps_value(text) >= limit:
        hint = f"images are in [0, 1]: did you mean --eps {text}/255?" if norm == "Linf" else "images are in [0, 1]"
        raise ConfigError(f"eps is {text} in {norm}; expected less than {limit:g}", hint=hint)


def parse_alphas(value: object) -> tuple[float, ...]:
    """``0.05:0.5:0.05`` (from, to, step; ends included) or ``0.1,0.2`` or a list -> numbers as given."""
    if isinstance(value, str) and ":" in value:
        try:
            start, stop, step = (Fraction(Decimal(part)) for part in value.split(":"))
        except (InvalidOperation, ValueError, OverflowError) as error:  # the last two for nan and infinity
            raise ValueError(f"alphas are {value!r}; expected FROM:TO:STEP such as 0.05:0.5:0.05") from error
        if step <= 0 or stop < start:
            raise ValueError(f"alphas {value!r} are an empty range: FROM must not exceed TO, and STEP must be above 0")
        if (n := int((stop - start) / step) + 1) > MOST_IN_A_GRID:
            raise ValueError(f"alphas {value!r} are {n:,} values, more than {MOST_IN_A_GRID:,}")
        return _alphas([float(start + i * step) for i in range(n)], value)
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    return _alphas([p for p in parts if str(p).strip()], value)


def _alphas(parts: list[Any], given: object) -> tuple[float, ...]:
    try:
        numbers = tuple(float(str(part).strip()) for part in parts)
    except ValueError as error:
        raise ValueError(f"alphas are {given!r}; each must be a number") from error
    if not numbers:
        raise ValueError("the list of alphas is empty")
    for number in numbers:
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(
                f"alpha is {number}; it must be 0 or above, in standard deviations (the paper: 0.05 to 0.5)"
            )
    return numbers


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


Eps = Annotated[str, BeforeValidator(parse_eps)]
EpsGrid = Annotated[str, BeforeValidator(parse_eps_grid)]
Alphas = Annotated[tuple[float, ...], BeforeValidator(parse_alphas)]
SiteRule = Annotated[str, BeforeValidator(parse_rule)]
Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
Paths = Annotated[tuple[Path, ...], BeforeValidator(_as_tuple)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Shard = Annotated[str, BeforeValidator(parse_shard)]
Split = Literal["test", "held-out", "calibration"]
SearchPrecision = Literal["fp32", "tf32", "bf16"] | None


class ModelConfig(BaseModel):
    """What every command has in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    """A zoo name, an alias, ``digits``, ``resnet18-w16``, ``timm:NAME``, ``torchvision:NAME`` or ``module:factory``."""
    weights: Path | None = None
    """A checkpoint for a model of the user's own."""
    dataset: str | None = None
    threat: Literal["Linf", "L2", "corruptions"] = "Linf"
    run: Path | None = None
    """Folder of the run; ``runs/<dataset>-<norm>-<model>`` when not given."""
    norm: Literal["Linf", "L2"] | None = None
    """The threat's own when not given (Linf for corruptions)."""
    allow_pickle: bool = False
    """Load a checkpoint that needs Python code to be run; only for files from a trusted source."""


class FetchConfig(ModelConfig):
    """``meansparse fetch``."""

    from_file: Path | None = None


class StageConfig(ModelConfig):
    """What the stages that run the model have in common."""

    data_dir: Path | None = None
    preprocessing: Literal["none", "Res256Crop224", "BicubicRes256Crop224", "Crop288", "Res224"] | None = None
    """What is done to ImageNet's pictures, by RobustBench's name; the model's own when not given."""
    device: str = "auto"
    seed: int = 0
    batch_size: int = Field(default=256, ge=1)
    n_examples: int | None = Field(default=None, ge=1)
    workers: int = Field(default=0, ge=0)


class CalibrateConfig(StageConfig):
    """``meansparse calibrate`` and ``meansparse sites``."""

    fraction: float | None = Field(default=None, gt=0, le=1)
    estimator: Literal["pooled", "published"] = "pooled"
    sites: SiteRule = "all"
    """Which sites, as ``site_rules.py`` says: names, patterns, indices, ranges, families. ``published`` for a model that
    has MeanSparse operators of its own, when not given."""
    statistics: Literal["measured", "stored"] = "measured"
    """Measured on images, or those (and the alpha) that a published checkpoint stores."""
    include_gates: bool = False


class AttackConfig(StageConfig):
    """What ``sweep-alpha`` and ``evaluate`` have in common."""

    eps: Eps | None = None
    """The budget, as a number or a fraction; the data set's own when not given."""


class SweepAlphaConfig(AttackConfig):
    """``meansparse sweep-alpha``."""

    alphas: Alphas = parse_alphas("0.05:0.5:0.05")
    attack: Names = ()
    """The attacks of the plain curve; those of the objective when not given. Their BPDA twins always run too."""
    objective: Literal["apgd-ce", "apgd", "bpda", "worst"] = "apgd-ce"
    """What decides which alpha the checkpoint carries; the paper's is ``apgd-ce``."""
    max_clean_drop: float = Field(default=0.5, ge=0)
    """How many percentage points of clean accuracy the choice may cost."""
    min_gain: float | None = Field(default=None, ge=0)
    """Standard errors that the choice must gain over alpha = 0; see ``choice.ChoiceRule``."""
    alpha_rule: Literal["shared", "per-depth", "per-site"] = "shared"
    sites: SiteRule = "all"
    """Which of the calibrated sites get the operator."""
    centre: Literal["channel-mean", "zero", "global-mean"] = "channel-mean"
    spread: Literal["channel-std", "site-std"] = "channel-std"
    racing: bool = True
    refine: int = Field(default=0, ge=0)
    """Rounds that add the alphas halfway between the best one and its neighbours."""
    precision: SearchPrecision = None
    """Of the attacks, as in ``evaluate``."""
    n_examples: int | None = Field(default=1000, ge=1)
    block_size: int = Field(default=64, ge=1)
    """Held-out images between two writes to disk, and between two looks of racing."""


class EvaluateConfig(AttackConfig):
    """``meansparse evaluate``."""

    attack: Names = ("standard", "bpda")
    alpha: float | None = None
    """Another alpha than the one that sweep-alpha chose."""
    sites: SiteRule = "all"
    """With ``alpha``: which of the calibrated sites get the operator."""
    centre: Literal["channel-mean", "zero", "global-mean"] = "channel-mean"
    spread: Literal["channel-std", "site-std"] = "channel-std"
    individual: bool = False
    eps: EpsGrid | None = None
    """One budget, or several: ``1/255:16/255:1/255``, ``2/255,8/255``."""
    precision: SearchPrecision = None
    """Of the search; every break is judged in float32. Not given: tf32 on a GPU, fp32 elsewhere."""
    compile: bool = False
    channels_last: bool | None = None
    """Memory format of the search; on where it pays when not given: on a CPU, and on a GPU below float32."""
    doubts: bool = True
    """Check what a sceptical reader would, on ``n_doubt_examples``; see ``doubts/``."""
    n_doubt_examples: int = Field(default=100, ge=1)
    pool: Paths = ()
    """Adversarial images from elsewhere, tried on both models as well; see ``pool.py``."""
    save_witnesses: bool = False
    """Keep the adversarial images that broke an example; see ``witnesses.py``."""
    split: Split = "test"
    shard: Shard | None = None
    """``3/8``: attack only every eighth example, the third first; see ``shard.py``."""
    name: Name | None = None
    """Keep this evaluation beside the others, in ``evaluations/<name>`` of the run folder."""


class VerifyConfig(AttackConfig):
    """``meansparse verify``."""

    alpha: float | None = Field(default=None, ge=0)
    """Another alpha than the one in use."""
    sites: SiteRule = "all"
    """With ``alpha``, as in ``evaluate``, and so ``centre`` and ``spread``."""
    centre: Literal["channel-mean", "zero", "global-mean"] = "channel-mean"
    spread: Literal["channel-std", "site-std"] = "channel-std"
    split: Split = "test"


class MeasureConfig(AttackConfig):
    """``meansparse measure``."""

    name: Name = "grid"
    """The measurement is kept in ``measurements/<name>`` of the run folder."""
    alphas: Alphas = parse_alphas("0.05:0.5:0.05")
    sites: Names = ("all",)
    """Rules as elsewhere, each scored by itself; ``single:*`` means every site alone, ``first:*`` the first 1, 2, ... sites."""
    attack: Names = ("apgd",)
    """The attacks of the plain columns; their BPDA twins always run too. ``none`` by itself: clean images alone."""
    eps: EpsGrid | None = None
    centre: Literal["channel-mean", "zero", "global-mean"] = "channel-mean"
    spread: Literal["channel-std", "site-std"] = "channel-std"
    split: Split = "test"
    precision: SearchPrecision = None
    """As in ``evaluate``."""
    block_size: int = Field(default=256, ge=1)
    """Images between two writes to disk."""


class PlotConfig(AttackConfig):
    """``meansparse plot``."""

    what: Literal["curve", "blocked", "histogram"] = "curve"
    site: str | None = None
    """Name or index of a site; the first one when not given."""
    channel: int = Field(default=0, ge=0)
    alpha: float | None = Field(default=None, ge=0)
    """Another alpha than the one that sweep-alpha chose."""
    n_examples: int | None = Field(default=256, ge=1)


STAGES: dict[str, type[ModelConfig]] = {
    "fetch": FetchConfig,
    "calibrate": CalibrateConfig,
    "sweep-alpha": SweepAlphaConfig,
    "evaluate": EvaluateConfig,
}
COMMANDS: dict[str, type[ModelConfig]] = {**STAGES, "measure": MeasureConfig}


class TrainConfig(BaseModel):
    """``meansparse train``. The defaults are the paper's (section A.1), and so ``--preset paper``; but for ``beta``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: Literal["paper", "short"] = "paper"
    """``short``: 30 epochs on a one-cycle schedule; some points below 200 epochs."""
    dataset: str = "digits"
    data_dir: Path | None = None
    run: Path | None = None
    """``runs/train-<dataset>-<method>-<activation>-w<width>`` when not given."""
    n_examples: int | None = Field(default=None, ge=1)
    """How many images of the calibration split; all of them when not given."""
    held_out_examples: int | None = Field(default=None, ge=1)
    """How many images choose the best epoch: 1,000 when not given, with ``paper_selection`` every test image."""
    test_examples: int = Field(default=1000, ge=1)
    workers: int = Field(default=0, ge=0)

    method: Literal["pgd", "trades", "standard"] = "pgd"
    beta: float = Field(default=6.0, ge=0)
    """Weight of the TRADES term: 6 as usual; the paper (section A.5) prints 0.6."""
    width: int = Field(default=64, ge=1)
    activation: Literal["relu", "elu", "gelu", "silu", "psilu", "pssilu"] = "gelu"
    eps: Eps | None = None
    """Linf budget of the attack; the data set's own when not given."""
    n_steps: int = Field(default=10, ge=1)
    step_size: Eps = "0.0078"

    epochs: int = Field(default=200, ge=1)
    batch_size: int = Field(default=256, ge=1)
    schedule: Literal["steps", "one-cycle"] = "steps"
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    crop_padding: int = Field(default=4, ge=0)
    flip: bool = True
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay a step of the exponential average of the weights; none when not given."""
    paper_selection: bool = False
    """Choose the best epoch on the test set, and train on the held-out images too, as the paper does."""
    seed: int = 0
    mean_sparse_alpha: float | None = Field(default=None, gt=0)
    """Train with the operator in place, up to this alpha; without it when not given."""
    mean_sparse_ramp: int | None = Field(default=None, ge=1)
    """How many epochs alpha grows; half of them when not given."""

    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool | None = None
    """Where the width is a multiple of 8, when not given."""
    compile: bool = False
    cuda_graphs: bool = False
    device: str = "auto"
    time_limit: float | None = Field(default=None, gt=0)
    """Minutes; no epoch is begun that would end later."""
    save_dtype: Literal["float32", "float16", "bfloat16"] = "float32"


SECTIONS: dict[str, type[BaseModel]] = {**COMMANDS, "train": TrainConfig}
"""The sections a YAML file may have."""
SETTINGS: dict[str, type[BaseModel]] = {
    **SECTIONS,
    "sites": CalibrateConfig,
    "verify": VerifyConfig,
    "plot": PlotConfig,
}
"""Command -> its settings, for those that have some."""
Config = TypeVar("Config", bound=BaseModel)

DATA_VARIABLE = "MEANSPARSE_DATA"


def resolve(
    command: str, config_class: type[Config], file: Path | None, flags: dict[str, Any]
) -> tuple[Config, dict[str, str]]:
    """Merge default, environment (``MEANSPARSE_DATA``), YAML file and flags (None = not given) for one command.

    Returns the settings and, for each field, where its value came from. Raises ConfigError on an unknown key (with the
    nearest known one) and on a value that cannot be used.
    """
    merged: dict[str, Any] = {}
    sources = dict.fromkeys(config_class.model_fields, "default")
    if "data_dir" in sources and os.environ.get(DATA_VARIABLE):
        merged["data_dir"], sources["data_dir"] = os.environ[DATA_VARIABLE], DATA_VARIABLE
    if file is not None:
        for key, value in _read_config_file(file, command).items():
            if key in config_class.model_fields:
                merged[key], sources[key] = value, str(file)
    for key, value in flags.items():
        if value is not None and key in config_class.model_fields:
            merged[key], sources[key] = value, "flag"
    try:
        config = config_class.model_validate(merged)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            message = item["msg"].removeprefix("Value error, ")
            source = sources.get(str(item["loc"][0]), "") if item["loc"] else ""
            where = f"--{key.replace('_', '-')}" if source == "flag" else f"{key} in {source}"
            problems.append(f"{where}: {message} (found {item['input']!r})")
        raise ConfigError("\n".join(problems)) from error
    return config, sources


def _read_config_file(file: Path, command: str) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"no config file {file}", hint="the shipped ones are in configs/")
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}, expected keys and values")
    known = {key for cls in SECTIONS.values() for key in cls.model_fields}
    settings: dict[str, Any] = {}
    for key, value in content.items():
        if key not in SECTIONS:
            _check_key(str(key), known | set(SECTIONS), str(file))
            settings[str(key)] = value
    for section, cls in SECTIONS.items():
        values = content.get(section) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: section {section} holds {values!r}, expected keys and values")
        for key in values:
            _check_key(str(key), set(cls.model_fields), f"{file}, section {section}")
        if section == command:
            settings |= values
    return settings


def _check_key(key: str, known: set[str], where: str) -> None:
    if key in known:
        return
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1) or difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
    raise ConfigError(f"{where}: unknown key {key!r}", hint=hint)
