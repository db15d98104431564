"""The commands, in pipeline order: options -> settings -> one library call -> the report's path on stdout."""

import errno
import inspect
import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic import BaseModel
from typer.core import TyperGroup

from .. import __version__
from ..errors import AttackError, MeanSparseError, StorageError
from ..reporting.console import console, note, show_error

INTERRUPTED = 130
TERMINATED = 143
UNFINISHED = 75  # EX_TEMPFAIL: batch systems queue such a job again


class _Terminated(KeyboardInterrupt):
    """SIGTERM, with which a batch system announces that it is about to kill."""


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def terminate(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Group(TyperGroup):
    """Turns our errors into a message on stderr and their exit code; a traceback only with --debug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _sigterm_raises():
                return super().invoke(ctx)
        except MeanSparseError as error:
            failure = error
        except KeyboardInterrupt as stop:
            if ctx.params.get("debug"):
                raise
            word, code = ("terminated", TERMINATED) if isinstance(stop, _Terminated) else ("interrupted", INTERRUPTED)
            again = "the same command without --fresh" if "--fresh" in sys.argv else "the same command"
            note(f"{word}: nothing finished was lost; {again} goes on from here")
            raise typer.Exit(code) from None
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported to print a help text
                raise
            failure = AttackError(
                f"out of memory: {str(error).splitlines()[0]}",
                hint="lower --batch-size: the same command with it goes on, nothing finished was lost",
            )
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
                raise
            failure = StorageError(
                f"{error.strerror}: {error.filename or 'a file could not be written'}",
                hint="nothing finished was lost: free some space or choose another --run, then type the same command again",
            )
        if ctx.params.get("debug"):
            raise failure
        show_error(failure)
        raise typer.Exit(failure.exit_code)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command with the defaults of its settings in its help: an option that is not given is None here, so that
        the YAML file is asked before the default.
        """
        command = super().get_command(ctx, cmd_name)
        if command is not None and ctx.resilient_parsing is False:
            _show_defaults(command, cmd_name)
        return command


_WHEN_NOT_GIVEN = {"n_examples": "all", "eps": "the data set's own", "dataset": "the model's own"}


def _show_defaults(command: Any, name: str) -> None:
    from ..settings.config import SETTINGS, STAGES

    classes = list(STAGES.values()) if name == "run" else [SETTINGS[name]] if name in SETTINGS else []
    fields = {key: field for settings in classes for key, field in settings.model_fields.items()}
    for option in command.params:
        default = fields[option.name].default if option.name in fields else None
        if default is None and option.name in fields:
            option.show_default = _WHEN_NOT_GIVEN.get(option.name, option.show_default)
        elif default is not None and default != () and not option.is_flag:
            option.show_default = ", ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        elif option.secondary_opts and isinstance(default, bool):
            option.show_default = (option.opts if default else option.secondary_opts)[0].removeprefix("--")


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    help="MeanSparse for adversarially trained image classifiers: fetch a model, calibrate its channel statistics, "
    "choose alpha on a held-out split, evaluate under attack.",
    epilog="One command for all four: meansparse run --model digits",
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"meansparse {__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


_MODEL, _DATA, _ATTACK, _RUN = "Model", "Data", "Attack", "Run"
Model = Annotated[
    str | None,
    typer.Option(
        help="Zoo name or alias ([b]Bartoldson2024[/b]), [b]digits[/b], [b]resnet18-w16[/b], [b]timm:NAME[/b], [b]torchvision:NAME[/b] or [b]module:factory[/b].",
        rich_help_panel=_MODEL,
    ),
]
Weights = Annotated[Path | None, typer.Option(help="Checkpoint of a model of your own.", rich_help_panel=_MODEL)]
Threat = Annotated[str | None, typer.Option(help="Linf, L2 or corruptions: which zoo entry.", rich_help_panel=_MODEL)]
AllowPickle = Annotated[
    bool | None,
    typer.Option(
        "--allow-pickle", help="Load weights that run Python code. Trusted files only.", rich_help_panel=_MODEL
    ),
]
FromFile = Annotated[Path | None, typer.Option(help="Take this file instead of downloading.", rich_help_panel=_MODEL)]
DatasetName = Annotated[
    str | None,
    typer.Option(
        help="digits, cifar10, cifar100, imagenet, or the path of an image folder, a zip of one, or an .npz.",
        rich_help_panel=_DATA,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder that holds the data set; the one that MEANSPARSE_DATA names by default.", rich_help_panel=_DATA
    ),
]
PreprocessingName = Annotated[
    str | None,
    typer.Option(
        help="Of ImageNet's pictures: Res256Crop224, BicubicRes256Crop224, Crop288 or Res224; none elsewhere. The model's own by default.",
        rich_help_panel=_DATA,
    ),
]
NExamples = Annotated[int | None, typer.Option(help="How many examples of the split to use.", rich_help_panel=_DATA)]
Fraction = Annotated[
    float | None, typer.Option(help="Share of the calibration split to use, in (0, 1].", rich_help_panel=_DATA)
]
Workers = Annotated[int | None, typer.Option(help="Processes that decode images.", rich_help_panel=_DATA)]
Estimator = Annotated[
    str | None,
    typer.Option(
        help="pooled (exact), or published (the reference code's average over batches).", rich_help_panel=_DATA
    ),
]
Statistics = Annotated[
    str | None,
    typer.Option(
        help="measured (on images), or stored: those, and the alpha, of a published checkpoint.", rich_help_panel=_DATA
    ),
]
Sites = Annotated[
    str | None,
    typer.Option(
        metavar="RULE",
        help="Sites to use, joined by commas: [b]all[/b], [b]main-path[/b], [b]after-addition[/b], [b]first:N[/b], "
        "[b]last:N[/b], [b]single:N[/b], indices [b]3[/b], ranges [b]7-12[/b] (both ends included), names, [b]layer1.*[/b]; [b]published[/b]: the authors' own, and the default for their models.",
        rich_help_panel=_MODEL,
    ),
]
IncludeGates = Annotated[
    bool | None,
    typer.Option("--include-gates", help="Squeeze-and-excitation gates too.", rich_help_panel=_MODEL),
]
Norm = Annotated[str | None, typer.Option(help="Linf or L2; the threat's own by default.", rich_help_panel=_ATTACK)]
Eps = Annotated[str | None, typer.Option(help="Budget in [0, 1] pixel units: 8/255 or 0.03.", rich_help_panel=_ATTACK)]
Attack = Annotated[
    list[str] | None,
    typer.Option(
        help="Attack or preset, may be repeated: apgd-ce, apgd, standard, pgd-50, square, bpda, ...",
        rich_help_panel=_ATTACK,
    ),
]
MeasuredAttack = Annotated[
    list[str] | None,
    typer.Option(
        help="Attack or preset, may be repeated: apgd-ce, apgd, square, ...; none: clean images alone.",
        rich_help_panel=_ATTACK,
    ),
]
Alphas = Annotated[
    str | None, typer.Option(help="Grid: 0.05:0.5:0.05 (ends included) or 0.1,0.2,0.3.", rich_help_panel=_ATTACK)
]
MaxCleanDrop = Annotated[
    float | None, typer.Option(help="Points of clean accuracy the choice may cost.", rich_help_panel=_ATTACK)
]
Objective = Annotated[
    str | None,
    typer.Option(
        help="Which curve chooses the alpha of the checkpoint: apgd-ce (the paper's), apgd, bpda or worst.",
        rich_help_panel=_ATTACK,
    ),
]
MinGain = Annotated[
    float | None,
    typer.Option(help="Standard errors the choice must gain over alpha = 0; else alpha = 0.", rich_help_panel=_ATTACK),
]
AlphaRule = Annotated[
    str | None,
    typer.Option(
        help="shared, per-depth or per-site: the last two search from the shared alpha.", rich_help_panel=_ATTACK
    ),
]
SweepSites = Annotated[
    str | None, typer.Option("--sites", help="Which of the calibrated sites get the operator.", rich_help_panel=_MODEL)
]
Centre = Annotated[
    str | None, typer.Option(help="channel-mean, zero or global-mean (paper, Table 8).", rich_help_panel=_ATTACK)
]
Spread = Annotated[str | None, typer.Option(help="Unit of alpha: channel-std, or site-std.", rich_help_panel=_ATTACK)]
Racing = Annotated[
    bool | None,
    typer.Option(
        "--racing/--no-racing", help="Drop alphas that are clearly behind; or score all.", rich_help_panel=_ATTACK
    ),
]
Refine = Annotated[
    int | None, typer.Option(help="Rounds that add the alphas next to the best one, halfway.", rich_help_panel=_ATTACK)
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        help="Images between two writes to disk; in a sweep, between two looks of racing as well.", rich_help_panel=_RUN
    ),
]
Alpha = Annotated[float | None, typer.Option(help="This alpha, not the chosen one.", rich_help_panel=_ATTACK)]
Individual = Annotated[
    bool | None,
    typer.Option("--individual", help="Each attack on every example, for its own number.", rich_help_panel=_ATTACK),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="Of the search: fp32, tf32 or bf16; tf32 on a GPU by default. Breaks are judged in float32.",
        rich_help_panel=_RUN,
    ),
]
Compile = Annotated[
    bool | None, typer.Option("--compile", help="Search a compiled form of the model.", rich_help_panel=_RUN)
]
ChannelsLast = Annotated[
    bool | None,
    typer.Option("--channels-last/--no-channels-last", help="Memory format of the search.", rich_help_panel=_RUN),
]
EpsGrid = Annotated[
    str | None,
    typer.Option(
        "--eps", help="Budget in [0, 1] pixel units: 8/255, or several: 2/255,8/255 or 1/255:16/255:1/255.",
        rich_help_panel=_ATTACK,
    ),
]  # fmt: skip
Doubts = Annotated[
    bool | None,
    typer.Option("--doubts/--no-doubts", help="Check what a sceptical reader would.", rich_help_panel=_ATTACK),
]
NDoubtExamples = Annotated[int | None, typer.Option(help="Examples to check it on.", rich_help_panel=_ATTACK)]
SaveWitnesses = Annotated[
    bool | None,
    typer.Option("--save-witnesses", help="Keep the images that broke an example.", rich_help_panel=_ATTACK),
]
Pool = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Adversarial images from elsewhere, in a form that verify reads, tried on both models too; may be repeated.",
        rich_help_panel=_ATTACK,
    ),
]
ShardText = Annotated[
    str | None,
    typer.Option(
        metavar="I/N",
        help="Attack only every Nth example, as job I of N; the command without it gathers them all.",
        rich_help_panel=_RUN,
    ),
]
SplitName = Annotated[
    str | None,
    typer.Option("--split", help="test; or calibration or held-out, which are training images.", rich_help_panel=_DATA),
]
EvaluationName = Annotated[
    str | None,
    typer.Option("--name", help="Keep it in evaluations/NAME of the run folder, beside others.", rich_help_panel=_RUN),
]
MeasurementName = Annotated[
    str | None,
    typer.Option("--name", help="Keep it in measurements/NAME of the run folder; [b]grid[/b] by default.", rich_help_panel=_RUN),
]  # fmt: skip
EachSites = Annotated[
    list[str] | None,
    typer.Option(
        "--sites",
        metavar="RULE",
        help="Sites that get the operator; each --sites is scored by itself. [b]single:*[/b]: every site alone, "
        "[b]first:*[/b]: the first one, two, ... sites.",
        rich_help_panel=_MODEL,
    ),
]
RunFolder = Annotated[
    Path | None,
    typer.Option("--run", help="Run folder; runs/<dataset>-<norm>-<model> by default.", rich_help_panel=_RUN),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="YAML with any of these options; flags win.", rich_help_panel=_RUN)
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda:0, ...", rich_help_panel=_RUN)]
Seed = Annotated[int | None, typer.Option(help="Seed of example order and attacks.", rich_help_panel=_RUN)]
BatchSize = Annotated[int | None, typer.Option(help="Images a forward pass.", rich_help_panel=_RUN)]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Do it again even if it was done, from nothing.", rich_help_panel=_RUN)
]
AsJson = Annotated[
    bool, typer.Option("--json", help="The report as JSON on stdout, not its path.", rich_help_panel=_RUN)
]


@app.command()
def fetch(
    model: Model = None, dataset: DatasetName = None, threat: Threat = None, weights: Weights = None,
    from_file: FromFile = None, allow_pickle: AllowPickle = None, norm: Norm = None, run: RunFolder = None,
    config: ConfigFile = None, fresh: Fresh = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Get a model's weights, whole and checked."""
    _stage("fetch", locals())


@app.command()
def sites(
    model: Model = None, dataset: DatasetName = None, data_dir: DataDir = None, preprocessing: PreprocessingName = None, threat: Threat = None,
    weights: Weights = None, allow_pickle: AllowPickle = None, norm: Norm = None, sites: Sites = None,
    include_gates: IncludeGates = None, run: RunFolder = None, config: ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="The sites as JSON on stdout, not a table on stderr.", rich_help_panel=_RUN)] = False,
) -> None:  # fmt: skip
    """Show a model's activations and which of them calibrate would use."""
    from dataclasses import asdict

    from ..reporting.model_tables import show_sites
    from ..settings.config import CalibrateConfig, resolve
    from ..stages.pipeline import list_sites

    settings, sources = resolve("calibrate", CalibrateConfig, config, locals())
    found, chosen = list_sites(settings, sources)
    if as_json:
        typer.echo(json.dumps([asdict(site) | {"chosen_by": chosen.get(site.index)} for site in found]))
        return
    console.print(show_sites(found, chosen))


@app.command()
def calibrate(
    model: Model = None, dataset: DatasetName = None, data_dir: DataDir = None, preprocessing: PreprocessingName = None, n_examples: NExamples = None,
    fraction: Fraction = None, estimator: Estimator = None, statistics: Statistics = None, sites: Sites = None,
    include_gates: IncludeGates = None, threat: Threat = None, weights: Weights = None, allow_pickle: AllowPickle = None, norm: Norm = None, run: RunFolder = None,
    config: ConfigFile = None, device: Device = None, seed: Seed = None, batch_size: BatchSize = None,
    workers: Workers = None, fresh: Fresh = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Learn each channel's mean and standard deviation in one pass."""
    _stage("calibrate", locals())


@app.command("sweep-alpha")
def sweep_alpha(
    model: Model = None, dataset: DatasetName = None, data_dir: DataDir = None, preprocessing: PreprocessingName = None, n_examples: NExamples = None,
    alphas: Alphas = None, attack: Attack = None, objective: Objective = None, max_clean_drop: MaxCleanDrop = None,
    min_gain: MinGain = None, alpha_rule: AlphaRule = None, sites: SweepSites = None, centre: Centre = None,
    spread: Spread = None, racing: Racing = None, refine: Refine = None, norm: Norm = None,
    eps: Eps = None, threat: Threat = None, weights: Weights = None, allow_pickle: AllowPickle = None,
    run: RunFolder = None, config: ConfigFile = None, device: Device = None, precision: Precision = None, seed: Seed = None,
    batch_size: BatchSize = None, block_size: BlockSize = None, workers: Workers = None, fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Choose alpha on the held-out split."""
    _stage("sweep-alpha", locals())


@app.command()
def evaluate(
    model: Model = None, dataset: DatasetName = None, data_dir: DataDir = None, preprocessing: PreprocessingName = None, n_examples: NExamples = None,
    attack: Attack = None, alpha: Alpha = None, sites: SweepSites = None, centre: Centre = None, spread: Spread = None,
    individual: Individual = None, norm: Norm = None, eps: EpsGrid = None, split: SplitName = None, name: EvaluationName = None,
    threat: Threat = None, weights: Weights = None, allow_pickle: AllowPickle = None, run: RunFolder = None,
    config: ConfigFile = None, device: Device = None, precision: Precision = None, compile: Compile = None,
    channels_last: ChannelsLast = None, doubts: Doubts = None, n_doubt_examples: NDoubtExamples = None,
    pool: Pool = None, save_witnesses: SaveWitnesses = None, shard: ShardText = None, seed: Seed = None, batch_size: BatchSize = None,
    workers: Workers = None, fresh: Fresh = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure base and sparsified model under attack, BPDA included."""
    _stage("evaluate", locals())


@app.command()
def measure(
    model: Model = None, dataset: DatasetName = None, data_dir: DataDir = None, preprocessing: PreprocessingName = None, n_examples: NExamples = None,
    alphas: Alphas = None, sites: EachSites = None, attack: MeasuredAttack = None, centre: Centre = None, spread: Spread = None,
    norm: Norm = None, eps: EpsGrid = None, split: SplitName = None, name: MeasurementName = None, threat: Threat = None,
    weights: Weights = None, allow_pickle: AllowPickle = None, run: RunFolder = None, config: ConfigFile = None,
    device: Device = None, precision: Precision = None, seed: Seed = None, batch_size: BatchSize = None,
    block_size: BlockSize = None, workers: Workers = None, fresh: Fresh = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Score many alphas, sites and eps on one split, plain and BPDA; choose nothing."""
    _stage("measure", locals())


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    what: Annotated[str | None, typer.Option(help="curve, blocked (share of features a site) or histogram (of a channel).")] = None,
    site: Annotated[str | None, typer.Option(help="Name or index of the site whose channel is drawn.")] = None,
    channel: Annotated[int | None, typer.Option(help="Which channel of it.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Draw at this alpha, not at the chosen one; no sweep is needed then.")] = None,
    dataset: DatasetName = None, data_dir: DataDir = None, n_examples: NExamples = None, device: Device = None,
    batch_size: BatchSize = None, seed: Seed = None,
) -> None:  # fmt: skip
    """Draw a sweep's curve; or, at its alpha or any other, what is blocked where, a channel before and after."""
    from ..settings.config import PlotConfig, resolve

    settings, sources = resolve("plot", PlotConfig, None, locals())
    from ..stages.plot import plot as draw

    typer.echo(str(draw(settings, sources)))


@app.command("run")
def run_all(
    model: Model = None, dataset: DatasetName = None, data_dir: DataDir = None, preprocessing: PreprocessingName = None, n_examples: NExamples = None,
    fraction: Fraction = None, estimator: Estimator = None, sites: Sites = None, include_gates: IncludeGates = None,
    alphas: Alphas = None, objective: Objective = None, max_clean_drop: MaxCleanDrop = None, min_gain: MinGain = None,
    alpha_rule: AlphaRule = None, racing: Racing = None, refine: Refine = None, centre: Centre = None, spread: Spread = None,
    attack: Attack = None, individual: Individual = None, doubts: Doubts = None, n_doubt_examples: NDoubtExamples = None,
    save_witnesses: SaveWitnesses = None, norm: Norm = None, eps: Eps = None, threat: Threat = None,
    weights: Weights = None, from_file: FromFile = None, allow_pickle: AllowPickle = None, run: RunFolder = None,
    config: ConfigFile = None, device: Device = None, precision: Precision = None, compile: Compile = None,
    channels_last: ChannelsLast = None, seed: Seed = None, batch_size: BatchSize = None, workers: Workers = None,
    fresh: Fresh = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """All four stages. --n-examples and --attack are those of evaluate; a YAML file has a section for each stage."""
    flags = locals()
    of_evaluate = {"n_examples", "attack"}
    for stage in ("fetch", "calibrate", "sweep-alpha"):
        _run_stage(stage, {k: v for k, v in flags.items() if k not in of_evaluate})
    _stage("evaluate", flags)


@app.command()
def table(
    number: Annotated[str, typer.Argument(help="1 to 12, headline or subset; summary: what became of the paper's claims, from the tables that lie in the folder.", show_default=False)],
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUN]...", help="Run folders with finished evaluations or measurements; COLUMN=RUN where a run does not tell its column.", show_default=False)] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for tableN.md and tableN.yaml.")] = Path("docs/tables"),
    data_note: Annotated[str | None, typer.Option(help="What the page says of the data, such as: CIFAR-10, JPEG copies.")] = None,
) -> None:  # fmt: skip
    """Put our cells beside those of a table of the paper."""
    from ..stages.table import write_table

    typer.echo(str(write_table(number, runs or [], output, data_note=data_note)))


def _reproduce(tables: list[str], **flags: Any) -> None:
    from ..settings.config import resolve
    from ..settings.paper import ReproduceConfig
    from ..stages.reproduce import reproduce as make_tables

    settings, _ = resolve("reproduce", ReproduceConfig, None, flags)
    make_tables(settings, tables)


def _options_of(settings: type[BaseModel]) -> Iterator[inspect.Parameter]:
    """The options that the fields of some settings declare."""
    for name, field in settings.model_fields.items():
        shown: Any = field.json_schema_extra
        kind: Any = next((t for t in get_args(field.annotation) if t is not type(None)), field.annotation)
        kind = list[str] if get_origin(field.annotation) is tuple else kind
        names = ["--output", "-o"] if name == "output" else [f"--{name.replace('_', '-')}"]
        default = shown["unset"] or (True if field.default in (None, (), False, "") else f"{field.default}")
        option = typer.Option(*names, help=field.description, rich_help_panel=shown["panel"], show_default=default)
        yield inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
        )


def _add_reproduce() -> None:
    from ..settings.paper import ReproduceConfig

    tables = Annotated[
        list[str],
        typer.Argument(metavar="TABLE...", help="1 to 12, headline, subset, figure1.", show_default=False),
    ]
    first = inspect.Parameter("tables", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=tables)
    parameters = [first, *_options_of(ReproduceConfig)]
    _reproduce.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    _reproduce.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command("reproduce", help="Make tables of the paper from nothing; goes on where it was killed.")(_reproduce)


_add_reproduce()


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.", show_default=False)],
    file: Annotated[Path | None, typer.Argument(help="File to write; one in the run folder by default.", show_default=False)] = None,
    format: Annotated[str, typer.Option("--format", help="meansparse: one self-contained .safetensors; robustbench: a .pt for RobustBench's own class.")] = "meansparse",
    card: Annotated[bool, typer.Option("--card", help="A leaderboard card, as JSON, of what evaluate measured.")] = False,
    alpha: Alpha = None, allow_pickle: AllowPickle = None,
) -> None:  # fmt: skip
    """Write a run's sparsified model as one file, or its leaderboard card."""
    from ..stages.export import export as write_export

    path = write_export(run, file, format="card" if card else format, alpha=alpha, allow_pickle=bool(allow_pickle))
    typer.echo(str(path))


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="Adversarial images: .safetensors, .pt, .npz or .npy.", show_default=False)],
    model: Model = None, dataset: DatasetName = None, data_dir: DataDir = None, preprocessing: PreprocessingName = None, norm: Norm = None, eps: Eps = None,
    alpha: Alpha = None, sites: SweepSites = None, centre: Centre = None, spread: Spread = None, split: SplitName = None,
    threat: Threat = None, weights: Weights = None, allow_pickle: AllowPickle = None, run: RunFolder = None,
    config: ConfigFile = None, device: Device = None, batch_size: BatchSize = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Judge adversarial images afresh, whoever made them."""
    from ..errors import DataError
    from ..runs.folder import locate_run, run_folder_lock
    from ..runs.report import read_report
    from ..settings.config import VerifyConfig, resolve
    from ..stages.verify import verify as verify_images

    settings, sources = resolve("verify", VerifyConfig, config, locals())
    with run_folder_lock(locate_run(settings).paths.folder):
        path, admissible = verify_images(settings, sources, file)
    typer.echo(json.dumps(read_report(path, "verify", mend="")) if as_json else str(path))
    if not admissible:
        note("some images break the rules: no attacker may use them")
        raise typer.Exit(DataError.exit_code)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder; or an evaluation, a measurement or a shard in it.", show_default=False)],
    format: Annotated[str, typer.Option("--format", help="table, markdown, json or html (one page, everything inside).")] = "table",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write, instead of stdout.", show_default=False)] = None,
) -> None:  # fmt: skip
    """Show a run's reports again: tables, verdict, doubts, curves."""
    import shutil

    from ..files import write_bytes
    from ..reporting.render import render

    text = render(run, format, width=shutil.get_terminal_size((120, 24)).columns, to_file=output is not None)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_bytes(output, text.encode())
        typer.echo(str(output))


_TRAINING = "Training"


def _training(text: str, *names: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_TRAINING)


@app.command()
def models(
    dataset: Annotated[str | None, typer.Option(help="digits, cifar10, cifar100 or imagenet.", rich_help_panel=_MODEL)] = None,
    threat: Threat = None,
    model: Annotated[str | None, typer.Option(metavar="PATTERN", help="Part of a name, or a glob: [b]wang2023*[/b].", rich_help_panel=_MODEL)] = None,
    check: Annotated[bool, typer.Option("--check", help="Build each and prove that MeanSparse works on it; exit code 1 if not.")] = False,
    run: Annotated[Path | None, typer.Option("--run", help="Folder of the check's report; runs/zoo-check by default.", rich_help_panel=_RUN)] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Models checked at a time, each in a process of its own.", rich_help_panel=_RUN)] = 1,
    fresh: Fresh = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on stdout.", rich_help_panel=_RUN)] = False,
) -> None:  # fmt: skip
    """List the zoo with its published figures, or check all of it."""
    import sys

    from ..stages.models import check_models, list_models, select_models

    selected = select_models(dataset, threat, model)
    if check:
        text, passed = check_models(selected, run, fresh=fresh, as_json=as_json, n_jobs=jobs)
        typer.echo(text)
        raise typer.Exit(0 if passed else 1)
    if text := list_models(selected, as_json=as_json, to_terminal=sys.stdout.isatty()):
        typer.echo(text)


@app.command()
def train(
    preset: Annotated[str | None, _training("paper (200 epochs, the defaults) or short (30, one-cycle; some points worse).")] = None,
    dataset: DatasetName = None, data_dir: DataDir = None, n_examples: NExamples = None,
    held_out_examples: Annotated[int | None, _training("Images that choose the best epoch: 1,000 held-out ones; with --paper-selection all test images.")] = None,
    test_examples: Annotated[int | None, _training("Images of the final measurement.")] = None,
    method: Annotated[str | None, _training("pgd, trades or standard.")] = None,
    beta: Annotated[float | None, _training("Weight of the TRADES term; 6 (the paper prints 0.6).")] = None,
    width: Annotated[int | None, _training("Base width of the ResNet-18.")] = None,
    activation: Annotated[str | None, _training("relu, elu, gelu, silu, psilu or pssilu.")] = None,
    eps: Eps = None,
    n_steps: Annotated[int | None, _training("Attack steps.")] = None,
    step_size: Annotated[str | None, _training("Attack step, in [0, 1] pixel units.")] = None,
    epochs: Annotated[int | None, _training("Passes over the calibration split.")] = None,
    batch_size: Annotated[int | None, _training("Images a step.")] = None,
    schedule: Annotated[str | None, _training("steps (the paper's) or one-cycle.")] = None,
    lr: Annotated[float | None, _training("Highest learning rate.")] = None,
    momentum: Annotated[float | None, _training("Momentum of SGD.")] = None,
    weight_decay: Annotated[float | None, _training("Weight decay; not of PSiLU's and PSSiLU's parameters.")] = None,
    crop_padding: Annotated[int | None, _training("Zero padding of the random crop.")] = None,
    flip: Annotated[bool | None, _training("Random horizontal flips.", "--flip/--no-flip")] = None,
    ema: Annotated[float | None, _training("Decay a step of an average of the weights, which is then what is measured and kept.")] = None,
    paper_selection: Annotated[bool | None, _training("As the paper does: train on the held-out images too, and choose the best epoch on test images.", "--paper-selection/--no-paper-selection")] = None,
    mean_sparse_alpha: Annotated[float | None, _training("Train with the operator in place, alpha growing up to this, mean and std an average over the training batches, adversarial ones; the paper advises against it.")] = None,
    mean_sparse_ramp: Annotated[int | None, _training("Epochs that alpha grows; half of them.")] = None,
    precision: Annotated[str | None, _training("fp32 or bf16 (autocast).")] = None,
    channels_last: Annotated[bool | None, _training("Memory layout; where the width is a multiple of 8.", "--channels-last/--no-channels-last")] = None,
    compile: Annotated[bool | None, _training("Through torch.compile.", "--compile/--no-compile")] = None,
    cuda_graphs: Annotated[bool | None, _training("Record an attack step and replay it: for networks too narrow to fill the GPU.", "--cuda-graphs/--no-cuda-graphs")] = None,
    time_limit: Annotated[float | None, _training("Minutes: begin no epoch that would end later; exit code 75, the same command goes on.")] = None,
    save_dtype: Annotated[str | None, _training("float32, float16 or bfloat16: of the weights in the file.")] = None,
    run: Annotated[Path | None, typer.Option("--run", help="Folder of the run; runs/train-<dataset>-<method>-<activation>-w<width> by default.", rich_help_panel=_RUN)] = None,
    config: ConfigFile = None, device: Device = None, seed: Seed = None, workers: Workers = None, fresh: Fresh = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Train a ResNet-18 (PGD, TRADES or standard) on the calibration split."""
    from ..settings.config import TrainConfig, resolve

    settings, sources = resolve("train", TrainConfig, config, locals())
    from ..runs.folder import run_folder_lock
    from ..runs.report import read_report
    from ..stages.train import train, train_folder

    with run_folder_lock(train_folder(settings)):
        path = train(settings, sources, fresh=fresh)
    if path is None:
        raise typer.Exit(UNFINISHED)
    typer.echo(json.dumps(read_report(path, "train", mend="")) if as_json else str(path.with_name("model.safetensors")))


def _stage(stage: str, flags: dict[str, Any]) -> None:
    """Run one stage and print what a shell wants to have: the report's path, or the report."""
    from ..runs.report import read_report

    path = _run_stage(stage, flags)
    typer.echo(json.dumps(read_report(path, stage, mend="")) if flags["as_json"] else str(path))


def _run_stage(stage: str, flags: dict[str, Any]) -> Path:
    """Resolve the settings of one stage, run it under the run folder's lock; the report's path."""
    from ..runs.folder import lock_for
    from ..settings.config import COMMANDS, resolve
    from ..stages import pipeline

    settings, sources = resolve(stage, COMMANDS[stage], flags["config"], flags)
    function: Any
    if stage == "measure":
        from ..stages.measure import measure as function
    else:
        function = getattr(pipeline, stage.replace("-", "_"))
    with lock_for(settings):
        path: Path = function(settings, sources, fresh=flags["fresh"])
    return path
