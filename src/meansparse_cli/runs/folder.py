"""A run folder: which one a command means, the model it is about, and the chain of reports in it."""

from __future__ import annotations

import errno
import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, CheckpointError, ConfigError
from ..files import sha256_of
from ..settings.shard import read_shard
from ..settings.stages import EvaluateConfig, FetchConfig, MeasureConfig, ModelConfig
from .report import RunPaths, read_report, verify_outputs

if TYPE_CHECKING:
    from ..models.source import ModelSource

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One run folder and the model it is about."""

    source: ModelSource
    paths: RunPaths
    norm: str
    name: str | None = None
    """Of an evaluation or a measurement that has a folder of its own inside the run's."""
    shard: str | None = None
    """``I/N``, of a shard, which has a folder of its own inside that of the evaluation."""

    def command(self, stage: str) -> str:
        """The command a user types for another stage of this run."""
        folder = self.paths.folder
        if self.shard is not None:
            folder = folder.parent.parent
        if self.name is not None:
            folder = folder.parent.parent
        model = ""
        if stage in ("fetch", "calibrate") and not RunPaths(folder).report("fetch").exists():
            from ..models.source import kind_of

            model = kind_of(self.source).options()
        return stage_command(stage, folder, self.name, self.shard, model=model)

    def place_of(self, config: ModelConfig) -> Run:
        """Where these settings write: the run folder, or the named evaluation or measurement inside it."""
        kind = {EvaluateConfig: "evaluations", MeasureConfig: "measurements"}.get(type(config))
        name = getattr(config, "name", None)
        if kind is None or name is None:
            return self
        return replace(self, paths=RunPaths(self.paths.folder / kind / name), name=name)

    def shard_of(self, config: ModelConfig) -> Run:
        """Where a shard of this evaluation writes its report; this place itself where the settings are no shard's."""
        shard = getattr(config, "shard", None)
        if shard is None:
            return self
        return replace(self, paths=RunPaths(self.paths.folder / "shards" / read_shard(shard).name), shard=shard)


def stage_command(
    stage: str, folder: Path, name: str | None = None, shard: str | None = None, *, model: str = ""
) -> str:
    """What a user types for a stage of the run in ``folder``, or for a named evaluation, a measurement or a shard in it."""
    options = [f" --{key} {value}" for key, value in (("name", name), ("shard", shard)) if value is not None]
    return f"meansparse {stage}{model} --run {folder}{''.join(options)}"


def locate_run(config: ModelConfig) -> Run:
    """The run folder that these settings mean: ``--run``, or one named after data set, norm and model."""
    from ..models.source import ModelSource, resolve_model

    is_new = config.run is None or not RunPaths(config.run).report("fetch").exists()
    if config.model is None and is_new and isinstance(config, FetchConfig) and config.from_file is not None:
        config = _with_model_of_file(config, config.from_file)
    if config.model is None:
        if config.run is None:
            raise ConfigError("no model and no run folder", hint="name one: --model digits, or --run runs/NAME")
        report = read_report(
            RunPaths(config.run).report("fetch"), "fetch", mend=f"meansparse fetch --model NAME --run {config.run}"
        )
        source = ModelSource(**report["results"]["model"])
        if config.threat not in ("Linf", source.threat):
            raise ConfigError(
                f"--threat {config.threat}: {config.run} is a run of {source.name} for {source.threat}",
                hint="leave it out, or name the model for that threat: --model NAME",
            )
        norm = config.norm or report["config"]["settings"].get("norm") or _norm_of(source.threat)
        return Run(source, RunPaths(config.run), norm)
    source = resolve_model(config.model, config.dataset, config.threat)
    norm = config.norm or _norm_of(source.threat)
    dataset = config.dataset or source.dataset
    folder = config.run or Path("runs") / file_name(f"{Path(dataset).stem}-{norm}-{source.name}")
    return Run(source, RunPaths(folder), norm)


def _with_model_of_file(config: FetchConfig, path: Path) -> FetchConfig:
    """A file of the authors says by its keys which model it is, so that no --model is needed."""
    from ..models.published_checkpoint import read_published

    if not path.exists():
        raise CheckpointError(f"no weights at {path}", hint="name the file that you got: --from-file FILE")
    held = read_published(path, allow_pickle=config.allow_pickle) if path.is_file() else None
    if held is None or held.file is None:
        raise ConfigError(
            f"{path} is not a file of the MeanSparse authors, so it does not say which model it is",
            hint="name its model: --model NAME",
        )
    meant = held.file.model
    update = {"model": meant.name, "dataset": meant.dataset, "threat": meant.threat}
    return config.model_copy(update=update)


def located(config: ModelConfig) -> Run:
    """The run, once its folder is known to be of this model; its weights must still be the ones that were fetched."""
    run = locate_run(config)
    report = read_report(run.paths.report("fetch"), "fetch", mend=run.command("fetch"))
    held = report["results"]["model"]
    if held != asdict(run.source):
        raise ArtifactError(
            f"{run.paths.folder} is a run of {held['name']} ({held['dataset']}), not of {run.source.name} ({run.source.dataset})",
            hint="choose another folder: --run DIR",
        )
    if config.weights is not None:
        _check_weights(run, config.weights, report)
    return run


def _check_weights(run: Run, weights: Path, fetched: dict[str, Any]) -> None:
    """Raises ArtifactError where ``--weights`` of a later stage are not those that were fetched: it would not use them."""
    from ..models.source import kind_of

    given = [sha256_of(path) if path.is_file() else None for path in kind_of(run.source).paths(weights)]
    if given != [file["sha256"] for file in fetched["results"]["files"]]:
        raise ArtifactError(
            f"--weights {weights} are not the weights that {run.paths.folder} is about",
            hint=f"another run for them: meansparse fetch --model {run.source.name} --weights {weights} --run DIR",
        )


def verified(run: Run, stage: str) -> dict[str, Any]:
    """The report of ``stage`` with its whole chain checked back to fetch."""
    order = ["fetch", "calibrate", "sweep-alpha"]
    report: dict[str, Any] = {}
    for i, name in enumerate(order[: order.index(stage) + 1]):
        mend = run.command(name)
        report = read_report(run.paths.report(name), name, mend=mend)
        verify_outputs(report, run.paths.folder, mend=mend)
        if i and report["inputs"][f"{order[i - 1]}.yaml"] != sha256_of(run.paths.report(order[i - 1])):
            raise ArtifactError(
                f"{name}.yaml was made from another {order[i - 1]}.yaml than the one in {run.paths.folder}",
                hint=f"run: {mend}",
            )
    return report


def weights_of(run: Run) -> list[Path]:
    """The files that fetch recorded, unchanged since."""
    paths = []
    report = read_report(run.paths.report("fetch"), "fetch", mend=run.command("fetch"))
    again = f"put it back, or fetch anew: {_fetch_anew(run, report)}"
    for file in report["results"]["files"]:
        path = Path(file["path"])
        if not path.exists():
            raise ArtifactError(f"the weights {path} are gone", hint=again)
        if sha256_of(path) != file["sha256"]:
            raise ArtifactError(f"the weights {path} changed since they were fetched", hint=again)
        paths.append(path)
    return paths


def _fetch_anew(run: Run, report: dict[str, Any]) -> str:
    """The fetch command with what its report says it was given: without its weights it would end with others."""
    from ..models.names import fetch_command

    settings = report["config"]["settings"]
    given = [(f"--{key.replace('_', '-')}", settings.get(key)) for key in ("norm", "weights", "from_file")]
    options = [word for key, value in given if value is not None for word in (key, str(value))]
    command = fetch_command(run.source)
    return f"{command} {shlex.join([*options, '--run', str(run.paths.folder), '--fresh'])}"


def weights_id(run: Run) -> str | None:
    """The sha256 of the weights that fetch recorded; None for those that timm and torchvision fetch themselves."""
    report = read_report(run.paths.report("fetch"), "fetch", mend=run.command("fetch"))
    return report["results"]["sha256"]  # type: ignore[no-any-return]


def _norm_of(threat: str) -> str:
    return "L2" if threat == "L2" else "Linf"


def file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-._" else "_" for c in text)


@contextmanager
def lock_for(config: ModelConfig) -> Iterator[None]:
    """The folder that these settings write into, for as long as a command is at work.

    The shards of an evaluation may be at work together, each once; anything else in their run has to wait.
    """
    whole = locate_run(config).place_of(config)
    place = whole.shard_of(config)
    with run_folder_lock(whole.paths.folder, shared=place is not whole):
        if place is whole:
            yield
        else:
            with run_folder_lock(place.paths.folder):
                yield


@contextmanager
def run_folder_lock(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """One writer a run folder: a second command on the same folder is refused while the first one runs.

    ``shared``: several may hold it together, as long as nobody has it alone.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"{folder} cannot be a run folder: a file is in its place", hint="name a folder: --run DIR"
        ) from error
    # "a+", because a network folder gives a shared lock only on a file open for reading, and an exclusive one for writing
    with open(folder / ".lock", "a+") as handle:
        try:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise ArtifactError(
                    f"another command is at work in {folder}", hint="wait for it, or use another --run"
                ) from error
            # such as ENOSYS of a file system that was mounted without locks, which is common on clusters
            log.warning(
                f"{folder} cannot be locked ({error.strerror}): see to it that one command at a time is at work there"
            )
        yield
