"""The settings of the commands that run a model: a class a command, an option a field; the help: ``commands.yaml``."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ..operator.checkpoint import Centre, Shape, Spread
from .arguments import Settings
from .values import (
    Alpha,
    AlphaGrid,
    BatchSize,
    Count,
    EpsGridText,
    EpsText,
    Few,
    FolderName,
    Names,
    NotNegative,
    Paths,
    Seed,
    ShardText,
    SiteRule,
    Whole,
    as_spelled,
    parse_alphas,
)

Norm = Annotated[Literal["Linf", "L2"], as_spelled("Linf", "L2")]
Threat = Annotated[Literal["Linf", "L2", "corruptions"], as_spelled("Linf", "L2", "corruptions")]
Split = Literal["test", "held-out", "calibration"]
OPERATOR_OPTIONS = ("sites", "centre", "spread", "shape")
"""What says which operators a checkpoint gets, besides alpha."""
Precision = Literal["fp32", "tf32", "bf16"]


class ModelConfig(Settings):
    """What every command has in common."""

    model: str | None = None
    weights: Path | None = None
    weights_key: str | None = None
    dataset: str | None = None
    threat: Threat = "Linf"
    run: Path | None = None
    norm: Norm | None = None
    """The threat's own when not given; of ``corruptions``: Linf."""
    allow_pickle: bool = False
    allow_code: bool = False


class FetchConfig(ModelConfig):
    from_file: Path | None = None


class StageConfig(ModelConfig):
    """What the stages that run the model have in common."""

    data_dir: Path | None = None
    preprocessing: Literal["none", "Res256Crop224", "BicubicRes256Crop224", "Crop288", "Res224"] | None = None
    class_order: Literal["text", "number"] | None = None
    """``text`` when not given, or what calibrate had."""
    device: str = "auto"
    seed: Seed = 0
    batch_size: BatchSize = "auto"
    """``auto``: 256, on a GPU the largest up to 1,024 that fits."""
    n_examples: Count | None = None
    workers: Few = 0


class SharedConfig(StageConfig):
    """What the stages have in common that several workers may share; neither is in a report."""

    shard: ShardText | None = Field(None, exclude=True)
    finish: bool = Field(False, exclude=True)
    plan: bool = Field(False, exclude=True)


class CalibrateConfig(SharedConfig):
    """``meansparse calibrate`` and ``meansparse sites``."""

    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    estimator: Literal["pooled", "published"] = "pooled"
    sites: SiteRule = "all"
    statistics: Literal["measured", "stored"] = "measured"
    include_gates: bool = False


class AttackConfig(StageConfig):
    """What the commands that know a budget have in common."""

    eps: EpsText | None = None


class OperatorConfig(StageConfig):
    """What the commands that apply operators have in common."""

    centre: Centre = "channel-mean"
    spread: Spread = "channel-std"
    shape: Shape | None = None
    """``hard``, the paper's, when not given."""


class SweepAlphaConfig(AttackConfig, OperatorConfig, SharedConfig):
    alphas: AlphaGrid = parse_alphas("0.05:0.5:0.05")
    attack: Names = ()
    """The attacks of the plain curve; those of the objective when not given. Their BPDA twins run too."""
    objective: Literal["apgd-ce", "apgd", "bpda", "worst"] = "apgd-ce"
    max_clean_drop: NotNegative = 0.5
    min_gain: NotNegative | None = None
    alpha_rule: Literal["shared", "per-depth", "per-site", "learned"] = "shared"
    sites: SiteRule = "all"
    racing: bool = True
    refine: Whole = 0
    precision: Precision | None = None
    n_examples: Count | None = 1000
    block_size: Count = 64


class EvaluateConfig(AttackConfig, OperatorConfig):
    """``meansparse evaluate``. ``sites``, ``centre``, ``spread`` and ``shape`` go with ``alpha``."""

    attack: Names = ("fast",)
    alpha: Alpha | None = None
    sites: SiteRule = "all"
    individual: bool = False
    defence: Names | None = None
    """Modules, in the place of MeanSparse: PATTERN or PATTERN=SURROGATE."""
    base: str | None = None
    draws: Count | None = None
    find_eps: bool | None = None
    eps: EpsGridText | None = None
    precision: Precision | None = None
    compile: bool = False
    channels_last: bool | None = None
    """On where it pays when not given: on a CPU, and on a GPU below float32."""
    doubts: bool = True
    n_doubt_examples: Count = 100
    pool: Paths = ()
    save_witnesses: bool = False
    split: Split = "test"
    shard: ShardText | None = None
    finish: bool = False
    plan: bool = Field(False, exclude=True)
    name: FolderName | None = None


class RunConfig(FetchConfig, CalibrateConfig, EvaluateConfig, SweepAlphaConfig):
    """``meansparse run``: what may be said to all four stages at once; each has settings of its own."""

    eps: EpsText | None = None


class MeasureConfig(AttackConfig, OperatorConfig, SharedConfig):
    name: FolderName = "grid"
    alphas: AlphaGrid = parse_alphas("0.05:0.5:0.05")
    sites: Names = ("all",)
    attack: Names = ("apgd",)
    """The attacks of the plain columns; their BPDA twins run too."""
    eps: EpsGridText | None = None
    split: Split = "test"
    precision: Precision | None = None
    block_size: Count = 256


class VerifyConfig(AttackConfig, OperatorConfig, SharedConfig):
    """``meansparse verify``. ``sites``, ``centre``, ``spread`` and ``shape`` go with ``alpha``."""

    file: Path = Field(exclude=True)
    alpha: Alpha | None = None
    sites: SiteRule = "all"
    split: Split = "test"


class PlotConfig(AttackConfig):
    run: Path
    what: Literal["curve", "blocked", "histogram"] = "curve"
    site: str | None = None
    """The first one when not given."""
    channel: Whole = 0
    alpha: NotNegative | None = None
    n_examples: Count | None = 256
