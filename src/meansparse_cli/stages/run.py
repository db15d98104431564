"""The stages by their commands, one at a time or ``meansparse run``: all four."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from ..reporting.console import phase
from ..runs.folder import locate_run, lock_for
from ..settings.commands import SECTIONS, STAGES
from ..settings.resolve import resolve
from .beforehand import check_all

OF_EVALUATE = ("n_examples", "attack")
"""Options of ``run`` that mean the last stage alone."""


def run_stage(command: str, flags: dict[str, Any], *, file: Path | None = None, fresh: bool = False) -> Path:
    """Resolve the settings of a stage, do it with its run folder locked; the report's path."""
    settings, sources = resolve(command, SECTIONS[command], file, flags)
    with lock_for(settings):
        return _function(command)(settings, sources, fresh=fresh)


def run_all(flags: dict[str, Any], *, file: Path | None = None, fresh: bool = False) -> Path:
    """All four stages, with their run folder locked from first to last; the path of the last one's report.

    What any of them would refuse in its settings is refused before the first begins.
    """
    of_all = {key: value for key, value in flags.items() if key not in OF_EVALUATE}
    asked = {c: resolve(c, SECTIONS[c], file, flags if c == STAGES[-1] else of_all) for c in STAGES}
    run = locate_run(asked["fetch"][0])
    folder, path = run.paths.folder, Path()
    with lock_for(asked["fetch"][0]):
        check_all(run, *(config for config, _ in asked.values()))
        for command, (config, sources) in asked.items():
            here = config.model_copy(update={"run": folder})
            with lock_for(here, held=folder), phase(command):
                path = _function(command)(here, sources, fresh=fresh)
    return path


def _function(command: str) -> Callable[..., Path]:
    name = command.replace("-", "_")
    return getattr(import_module(f".{name}", __package__), name)  # type: ignore[no-any-return]
