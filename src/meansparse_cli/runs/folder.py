"""A run folder: which one a command means, the model it is about, who may write into it, and whose code it may run.

A folder comes from anywhere, and importing the code that it names is running it.
"""

import logging
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, CheckpointError, ConfigError, StorageError
from ..files import discard, locked, read_json, write_json
from ..ledger import key_digest
from ..models.factory import code_of
from ..models.names import model_options
from ..models.published_checkpoint import read_published
from ..models.source import ModelSource, kind_of, resolve_model
from ..settings.shard import read_shard
from ..settings.stages import EvaluateConfig, FetchConfig, MeasureConfig, ModelConfig, VerifyConfig
from .report import RunPaths, read_report, stage_command

log = logging.getLogger(__name__)

LONGEST_NAME = 200
"""Bytes of a folder's name that leave room for what is put beside it; file systems take 255."""

ReadReport = Callable[..., dict[str, Any]]
"""``read_report``, or one that remembers what it has read."""


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
        for part in (self.shard, self.name):
            folder = folder if part is None else folder.parent.parent
        model = ""
        if stage in ("fetch", "calibrate") and not RunPaths(folder).report("fetch").exists():
            model = model_options(self.source)
        return stage_command(stage, folder, self.name, self.shard, model=model)


def places_in(folder: Path, config: ModelConfig) -> tuple[Path, Path]:
    """Where these settings write in a run's ``folder``: in a named evaluation or measurement, or for a file that is
    verified, and in a shard of that.
    """
    kind = {EvaluateConfig: "evaluations", MeasureConfig: "measurements", VerifyConfig: "verify"}.get(type(config))
    name, shard = getattr(config, "name", None), getattr(config, "shard", None)
    if isinstance(config, VerifyConfig):
        name = file_name(config.file.name)
    whole = folder if kind is None or name is None else folder / kind / name
    return whole, whole if shard is None else whole / "shards" / read_shard(shard).name


def folder_of(config: ModelConfig) -> Path:
    """The run folder that these settings mean; a run that is there is not read for it."""
    if config.run is not None and RunPaths(config.run).report("fetch").exists():
        return config.run
    return locate_run(config).paths.folder


def locate_run(config: ModelConfig, read: ReadReport = read_report) -> Run:
    """The run folder that these settings mean: ``--run``, or one named after data set, norm and model."""
    is_new = config.run is None or not RunPaths(config.run).report("fetch").exists()
    if config.model is None and is_new and isinstance(config, FetchConfig) and config.from_file is not None:
        config = _with_model_of_file(config, config.from_file)
    if config.model is None:
        if config.run is None:
            raise ConfigError("no model and no run folder", hint="name one: --model digits, or --run runs/NAME")
        return _run_in(config.run, config, read)
    source = resolve_model(config.model, config.dataset, config.threat)
    norm = config.norm or _norm_of(source.threat)
    dataset = config.dataset or source.dataset
    folder = config.run or Path("runs") / file_name(f"{Path(dataset).stem}-{norm}-{source.name}")
    return Run(source, RunPaths(folder), norm)


def _run_in(folder: Path, config: ModelConfig, read: ReadReport) -> Run:
    """The run whose model is the one that was fetched there."""
    paths = RunPaths(folder)
    report = read(paths.report("fetch"), "fetch", mend=stage_command("fetch", folder))
    source = ModelSource(**report["results"]["model"])
    if "threat" in config.model_fields_set and config.threat != source.threat:
        raise ConfigError(
            f"--threat {config.threat}: {folder} is a run of {source.name} for {source.threat}",
            hint="leave it out, or name the model for that threat: --model NAME",
        )
    norm = config.norm or report["config"]["settings"].get("norm") or _norm_of(source.threat)
    return Run(source, paths, norm)


def _with_model_of_file(config: FetchConfig, path: Path) -> FetchConfig:
    """A file of the authors says by its keys which model it is, so that no --model is needed."""
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


def _norm_of(threat: str) -> str:
    return "L2" if threat == "L2" else "Linf"


def file_name(text: str) -> str:
    """``text`` with nothing but letters, digits and ``-._``; where no file can have so long a name, a short one."""
    name = "".join(c if c.isalnum() or c in "-._" else "_" for c in text)
    return name if len(name.encode()) <= LONGEST_NAME else f"{name[:40]}-{key_digest(text)}"


@contextmanager
def lock_for(config: ModelConfig, *, held: Path | None = None) -> Iterator[None]:
    """The folder that these settings write into, for as long as a command is at work; ``held`` is locked already.

    The shards of an evaluation may be at work together, each once; anything else in their run has to wait.
    """
    whole, place = places_in(folder_of(config), config)
    with ExitStack() as locks:
        for folder in dict.fromkeys((whole, place)):
            if folder != held:
                locks.enter_context(run_folder_lock(folder, shared=folder != place))
        yield


@contextmanager
def run_folder_lock(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """One writer a run folder, or, ``shared``, several together: a second command on the same folder is refused.

    A folder that a command made and wrote nothing into goes with its error.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(
            f"{folder} cannot be a run folder: a file is in its place", hint="name a folder: --run DIR"
        ) from error
    with ExitStack() as held:
        try:
            reason = held.enter_context(locked(folder / ".lock", shared=shared))
        except BlockingIOError as error:
            raise ArtifactError(
                f"another command is at work in {folder}", hint="wait for it, or use another --run"
            ) from error
        except OSError as error:
            raise StorageError(
                f"{folder / '.lock'} cannot be opened: {error.strerror}",
                hint=f"remove it, then type the same command again: {shlex.join(['rm', '-r', str(folder / '.lock')])}",
            ) from error
        if reason is not None:
            log.warning(f"{folder} cannot be locked ({reason}): see to it that one command at a time is at work there")
        try:
            yield
        except BaseException:
            if made and folder.exists() and os.listdir(folder) == [".lock"]:
                discard(folder)
                with suppress(OSError):  # of others, who have put something there meanwhile
                    for parent in made[1:]:
                        parent.rmdir()
            raise


def check_code(run: Run, config: ModelConfig) -> None:
    """Nothing where the model of ``run`` is no code of a user's, or this user meant it to be run.

    That is: typed as ``--model``, allowed by ``--allow-code``, or fetched by this user from the same place before.
    Raises ArtifactError otherwise, before anything is imported.
    """
    if not kind_of(run.source).names_code or config.model is not None or config.allow_code:
        return
    code = code_of(run.source.name)
    if code is None:
        raise ArtifactError(
            f"{run.paths.folder} names code as its network, {run.source.name}, which is not found from {Path.cwd()}",
            hint="type the command in the folder where the model was fetched",
        )
    with suppress(ArtifactError):
        if read_json(_record(code)) == {"code": code}:
            return
    raise ArtifactError(
        f"{run.paths.folder} names code as its network, {run.source.name}, which would be run; "
        "you did not fetch it from there yourself",
        hint="if you trust it: the same command with --allow-code (in Python: allow_code=True)",
    )


def remember_code(run: Run) -> None:
    """Record, outside the run folder, that this user fetched the code of ``run`` from where it is."""
    code = code_of(run.source.name) if kind_of(run.source).names_code else None
    if code is None:
        return
    try:
        write_json(_record(code), {"code": code})
    except StorageError as error:
        log.warning(f"{error.message}; later commands on {run.paths.folder} need --model or --allow-code")


def _record(code: str) -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    return state / "meansparse" / "code" / f"{key_digest(code)}.json"
