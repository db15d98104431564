"""Who may write into a run folder: one command at a time, or the shards of one evaluation together."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import ArtifactError, ConfigError
from ..lock import locked
from ..settings.stages import ModelConfig
from .folder import folder_of, place_in, shard_in

log = logging.getLogger(__name__)


@contextmanager
def lock_for(config: ModelConfig) -> Iterator[None]:
    """The folder that these settings write into, for as long as a command is at work.

    The shards of an evaluation may be at work together, each once; anything else in their run has to wait.
    """
    whole = place_in(folder_of(config), config)
    place = shard_in(whole, config)
    with run_folder_lock(whole, shared=place != whole):
        if place == whole:
            yield
        else:
            with run_folder_lock(place):
                yield


@contextmanager
def run_folder_lock(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """One writer a run folder: a second command on the same folder is refused while the first one runs.

    ``shared``: several may hold it together, as long as nobody has it alone.
    """
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
        if reason is not None:
            log.warning(f"{folder} cannot be locked ({reason}): see to it that one command at a time is at work there")
        yield
