"""The settings of the commands that run a model: a class a command, an option a field."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from .options import (
    ALLOW_PICKLE,
    DATASET,
    THREAT,
    Alpha,
    DataDir,
    Device,
    Eps,
    NExamples,
    Seed,
    Settings,
    Workers,
    argument,
    of_attack,
    of_data,
    of_model,
    of_run,
    option,
)
from .values import AlphaGrid, EpsGridText, FolderName, Names, Paths, ShardText, SiteRule, parse_alphas

Split = Annotated[
    Literal["test", "held-out", "calibration"], of_data("test; or calibration or held-out, which are training images.")
]
CalibratedSites = Annotated[SiteRule, of_model("Which of the calibrated sites get the operator.")]
Alphas = Annotated[AlphaGrid, of_attack("Grid: 0.05:0.5:0.05 (ends included) or 0.1,0.2,0.3.")]
Centre = Annotated[
    Literal["channel-mean", "zero", "global-mean"], of_attack("channel-mean, zero or global-mean (paper, Table 8).")
]
Spread = Annotated[Literal["channel-std", "site-std"], of_attack("Unit of alpha: channel-std, or site-std.")]
Attack = Annotated[
    Names, of_attack("Attack or preset, may be repeated: apgd-ce, apgd, standard, pgd-50, square, bpda, ...")
]
EpsGrid = Annotated[
    EpsGridText | None,
    of_attack(
        "Budget in [0, 1] pixel units: 8/255, or several: 2/255,8/255 or 1/255:16/255:1/255.",
        unset="the data set's own",
    ),
]
Precision = Annotated[
    Literal["fp32", "tf32", "bf16"] | None,
    of_run("Of the search: fp32, tf32 or bf16; tf32 on a GPU by default. Breaks are judged in float32."),
]
BlockSize = Annotated[
    int, of_run("Images between two writes to disk; in a sweep, between two looks of racing as well.", ge=1)
]


class ModelConfig(Settings):
    """What every command has in common."""

    model: str | None = of_model(
        "Zoo name or alias ([b]Bartoldson2024[/b]), [b]digits[/b], [b]resnet18-w16[/b], [b]timm:NAME[/b], "
        "[b]torchvision:NAME[/b] or [b]module:factory[/b].",
        None,
    )
    weights: Path | None = of_model("Checkpoint of a model of your own.", None)
    dataset: Annotated[str | None, DATASET] = None
    threat: Annotated[Literal["Linf", "L2", "corruptions"], THREAT] = "Linf"
    run: Path | None = of_run("Run folder; runs/<dataset>-<norm>-<model> by default.", None)
    norm: Literal["Linf", "L2"] | None = of_attack("Linf or L2; the threat's own by default.", None)
    """Of the threat ``corruptions``: Linf."""
    allow_pickle: Annotated[bool, ALLOW_PICKLE] = False


class FetchConfig(ModelConfig):
    from_file: Path | None = of_model("Take this file instead of downloading.", None)


class StageConfig(ModelConfig):
    """What the stages that run the model have in common."""

    data_dir: DataDir = None
    preprocessing: Literal["none", "Res256Crop224", "BicubicRes256Crop224", "Crop288", "Res224"] | None = of_data(
        "Of ImageNet's pictures: Res256Crop224, BicubicRes256Crop224, Crop288 or Res224; none elsewhere. "
        "The model's own by default.",
        None,
    )
    device: Device = "auto"
    seed: Seed = 0
    batch_size: int = of_run("Images a forward pass.", 256, ge=1)
    n_examples: NExamples = None
    workers: Workers = 0


class CalibrateConfig(StageConfig):
    """``meansparse calibrate`` and ``meansparse sites``."""

    fraction: float | None = of_data("Share of the calibration split to use, in (0, 1].", None, gt=0, le=1)
    estimator: Literal["pooled", "published"] = of_data(
        "pooled (exact), or published (the reference code's average over batches).", "pooled"
    )
    sites: SiteRule = of_model(
        "Sites to use, joined by commas: [b]all[/b], [b]main-path[/b], [b]after-addition[/b], [b]first:N[/b], "
        "[b]last:N[/b], [b]single:N[/b], indices [b]3[/b], ranges [b]7-12[/b] (both ends included), names, "
        "[b]layer1.*[/b]; [b]published[/b]: the authors' own, and the default for their models.",
        "all",
        metavar="RULE",
    )
    statistics: Literal["measured", "stored"] = of_data(
        "measured (on images), or stored: those, and the alpha, of a published checkpoint.", "measured"
    )
    include_gates: bool = of_model("Squeeze-and-excitation gates too.", False)


class AttackConfig(StageConfig):
    """What the commands that know a budget have in common."""

    eps: Eps = None


class SweepAlphaConfig(AttackConfig):
    alphas: Alphas = parse_alphas("0.05:0.5:0.05")
    attack: Attack = ()
    """The attacks of the plain curve; those of the objective when not given. Their BPDA twins always run too."""
    objective: Literal["apgd-ce", "apgd", "bpda", "worst"] = of_attack(
        "Which curve chooses the alpha of the checkpoint: apgd-ce (the paper's), apgd, bpda or worst.", "apgd-ce"
    )
    max_clean_drop: float = of_attack("Points of clean accuracy the choice may cost.", 0.5, ge=0)
    min_gain: float | None = of_attack(
        "Standard errors the choice must gain over alpha = 0; else alpha = 0.", None, ge=0
    )
    alpha_rule: Literal["shared", "per-depth", "per-site"] = of_attack(
        "shared, per-depth or per-site: the last two search from the shared alpha.", "shared"
    )
    sites: CalibratedSites = "all"
    centre: Centre = "channel-mean"
    spread: Spread = "channel-std"
    racing: bool = of_attack("Drop alphas that are clearly behind; or score all.", True)
    refine: int = of_attack("Rounds that add the alphas next to the best one, halfway.", 0, ge=0)
    precision: Precision = None
    n_examples: NExamples = 1000
    block_size: BlockSize = 64


class EvaluateConfig(AttackConfig):
    """``meansparse evaluate``. ``sites``, ``centre`` and ``spread`` go with ``alpha``."""

    attack: Attack = ("standard", "bpda")
    alpha: Alpha = None
    sites: CalibratedSites = "all"
    centre: Centre = "channel-mean"
    spread: Spread = "channel-std"
    individual: bool = of_attack("Each attack on every example, for its own number.", False)
    eps: EpsGrid = None
    precision: Precision = None
    compile: bool = of_run("Search a compiled form of the model.", False)
    channels_last: bool | None = of_run("Memory format of the search.", None)
    """On where it pays when not given: on a CPU, and on a GPU below float32."""
    doubts: bool = of_attack("Check what a sceptical reader would.", True)
    n_doubt_examples: int = of_attack("Examples to check it on.", 100, ge=1)
    pool: Paths = of_attack(
        "Adversarial images from elsewhere, in a form that verify reads, tried on both models too; may be repeated.",
        (),
        metavar="FILE",
    )
    save_witnesses: bool = of_attack("Keep the images that broke an example.", False)
    split: Split = "test"
    shard: ShardText | None = of_run(
        "Attack only every Nth example, as job I of N; the command without it gathers them all.", None, metavar="I/N"
    )
    name: FolderName | None = of_run("Keep it in evaluations/NAME of the run folder, beside others.", None)


class RunConfig(FetchConfig, CalibrateConfig, EvaluateConfig, SweepAlphaConfig):
    """``meansparse run``: what may be said to all four stages at once; each has settings of its own."""

    eps: Eps = None


class MeasureConfig(AttackConfig):
    name: FolderName = of_run("Keep it in measurements/NAME of the run folder; [b]grid[/b] by default.", "grid")
    alphas: Alphas = parse_alphas("0.05:0.5:0.05")
    sites: Names = of_model(
        "Sites that get the operator; each --sites is scored by itself. [b]single:*[/b]: every site alone, "
        "[b]first:*[/b]: the first one, two, ... sites.",
        ("all",),
        metavar="RULE",
    )
    attack: Names = of_attack(
        "Attack or preset, may be repeated: apgd-ce, apgd, square, ...; none: clean images alone.", ("apgd",)
    )
    """The attacks of the plain columns; their BPDA twins always run too."""
    eps: EpsGrid = None
    centre: Centre = "channel-mean"
    spread: Spread = "channel-std"
    split: Split = "test"
    precision: Precision = None
    block_size: BlockSize = 256


class VerifyConfig(AttackConfig):
    """``meansparse verify``. ``sites``, ``centre`` and ``spread`` go with ``alpha``."""

    alpha: Annotated[Alpha, Field(ge=0)] = None
    sites: CalibratedSites = "all"
    centre: Centre = "channel-mean"
    spread: Spread = "channel-std"
    split: Split = "test"


class PlotConfig(AttackConfig):
    run: Path = argument("Run folder.")
    what: Literal["curve", "blocked", "histogram"] = option(
        "curve, blocked (share of features a site) or histogram (of a channel).", "curve"
    )
    site: str | None = option("Name or index of the site whose channel is drawn.", None)
    """The first one when not given."""
    channel: int = option("Which channel of it.", 0, ge=0)
    alpha: float | None = option("Draw at this alpha, not at the chosen one; no sweep is needed then.", None, ge=0)
    n_examples: NExamples = 256
