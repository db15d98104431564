"""Whether code that a run folder names may be run: a folder comes from anywhere, and importing is running."""

import logging
import os
from contextlib import suppress
from pathlib import Path

from ..errors import ArtifactError, StorageError
from ..files import read_json, write_json
from ..ledger import key_digest
from ..models.factory import code_of
from ..models.source import kind_of
from ..settings.stages import ModelConfig
from .folder import Run

log = logging.getLogger(__name__)


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
    if not _is_recorded(code):
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


def _is_recorded(code: str) -> bool:
    with suppress(ArtifactError):
        return read_json(_record(code)) == {"code": code}
    return False


def _record(code: str) -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    return state / "meansparse" / "code" / f"{key_digest(code)}.json"
