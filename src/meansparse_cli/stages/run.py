"""The stages by their commands, one at a time or ``meansparse run``: all four."""

from importlib import import_module
from pathlib import Path
from typing import Any

from ..runs.folder import lock_for
from ..settings.commands import SECTIONS, STAGES
from ..settings.resolve import resolve

OF_EVALUATE = ("n_examples", "attack")
"""Options of ``run`` that mean the last stage alone."""


def run_stage(command: str, flags: dict[str, Any], *, file: Path | None = None, fresh: bool = False) -> Path:
    """Resolve the settings of a stage, do it with its run folder locked; the report's path."""
    name = command.replace("-", "_")
    settings, sources = resolve(command, SECTIONS[command], file, flags)
    with lock_for(settings):
        path: Path = getattr(import_module(f".{name}", __package__), name)(settings, sources, fresh=fresh)
    return path


def run_all(flags: dict[str, Any], *, file: Path | None = None, fresh: bool = False) -> Path:
    """All four stages; the path of the last one's report."""
    *before, last = STAGES
    of_all = {key: value for key, value in flags.items() if key not in OF_EVALUATE}
    for command in before:
        run_stage(command, of_all, file=file, fresh=fresh)
    return run_stage(last, flags, file=file, fresh=fresh)
