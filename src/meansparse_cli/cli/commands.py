"""What each command does: its settings, one call of a stage, and what a shell wants to have on stdout."""

import contextlib
import json
import shutil
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import typer

from ..errors import ArtifactError, ConfigError, DataError
from ..files import write_bytes
from ..foreign import reading
from ..reporting.console import answer, console, note
from ..reporting.model_tables import show_sites
from ..runs.report import read_report
from ..settings import arguments
from ..settings.commands import COMMANDS, STAGES
from ..settings.resolve import resolve
from ..settings.stages import CalibrateConfig, PlotConfig, StageConfig
from ..settings.training import TrainConfig
from .interrupt import UNFINISHED, time_limit
from .options import Flags, Function


def _aside() -> contextlib.AbstractContextManager[object]:
    """What a network's own code prints goes to stderr meanwhile: stdout is for the result."""
    return contextlib.redirect_stdout(sys.stderr)


def _do(name: str, flags: Flags, given: arguments.StageArguments) -> Path | None:
    """The report of one stage, of ``run`` that of the last: its path; None where there is none, as of a plan."""
    from ..stages.run import run_all, run_stage

    path: Path | None
    limit = given.time_limit if isinstance(given, arguments.LongArguments) else None
    with _aside(), time_limit(limit, fresh=given.fresh):
        if name == "run":
            path, name = run_all(flags, file=given.config, fresh=given.fresh), STAGES[-1]
        else:
            path = run_stage(name, flags, given)
    if path is not None:
        _print_report(path, name, given.as_json)
    return path


def _print_report(path: Path, stage: str, as_json: bool, otherwise: Path | None = None) -> None:
    """A report as JSON, or else its path, or that of what it is about."""
    answer(json.dumps(read_report(path, stage, mend="")) if as_json else str(otherwise or path))


def sites(flags: Flags, given: arguments.StageArguments) -> None:
    """A table for people, or all of it as JSON."""
    from ..stages.sites import list_sites

    with _aside():
        found, chosen = list_sites(*resolve("calibrate", CalibrateConfig, given.config, flags))
    if given.as_json:
        answer(json.dumps([asdict(site) | {"chosen_by": chosen.get(site.index)} for site in found]))
        return
    console.print(show_sites(found, chosen))


def plot(flags: Flags, _: arguments.StageArguments) -> None:
    """The path of the picture."""
    settings, sources = resolve("plot", PlotConfig, None, flags)
    from ..stages.plot import plot as draw

    with _aside():
        path = draw(settings, sources)
    answer(str(path))


def table(_: Flags, given: arguments.Table) -> None:
    """The path of the page."""
    from ..stages.table import write_table

    answer(str(write_table(given.number, given.runs or [], given.output, data_note=given.data_note)))


def reproduce(_: Flags, given: arguments.Reproduce) -> None:
    """The paths of the pages; or the commands, a line each."""
    from ..stages.reproduce import reproduce as make_tables

    make_tables(given)


def export(_: Flags, given: arguments.Export) -> None:
    """The path of the file."""
    from ..stages.export import export as write_export

    format = "hub-card" if given.hub_card else "card" if given.card else given.format
    config = StageConfig(run=given.run, allow_pickle=bool(given.allow_pickle), allow_code=bool(given.allow_code))
    with _aside():
        path = write_export(given.file, config=config, format=format, alpha=given.alpha)
    answer(str(path))


def verify(flags: Flags, given: arguments.StageArguments) -> None:
    """The report; and an error where an image breaks the rules."""
    path = _do("verify", flags, given)
    if path is not None and not read_report(path, "verify", mend="")["results"].get("admissible", True):
        note("some images break the rules: no attacker may use them")
        raise typer.Exit(DataError.exit_code)


def report(_: Flags, given: arguments.Report) -> None:
    """The page itself; or the path of the file that it is written to."""
    from ..reporting.render import render

    width = shutil.get_terminal_size((120, 24)).columns
    with reading(ArtifactError, f"the reports of {given.run} cannot be shown", "do again the stage that lacks it"):
        text = render(given.run, given.format, width=width, to_file=given.output is not None)
    _give(text, given.output)


def compare(_: Flags, given: arguments.Compare) -> None:
    """The table itself; or the path of the file that it is written to."""
    from ..reporting.compare import compare as compare_evaluations

    width = shutil.get_terminal_size((120, 24)).columns
    text, notes = compare_evaluations(given.runs, given.format, width=width)
    for line in notes:
        note(line)
    _give(text, given.output)


def _give(text: str, output: Path | None) -> None:
    """A page on stdout; or in a file, whose path is the answer."""
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_bytes(output, text.encode())
        answer(str(output))


def models(_: Flags, given: arguments.Models) -> None:
    """The list as a table, as names or as JSON; with ``--check`` the report, and exit code 1 where an entry failed."""
    from ..stages.models import list_models, select_models

    selected = select_models(given.dataset, given.threat, given.model)
    if given.check:
        from ..stages.zoo_check import check_models  # torch is not loaded for a list

        if (checked := check_models(selected, given)) is not None:
            text, passed = checked
            answer(text)
            raise typer.Exit(0 if passed else 1)
        return
    if idle := given.model_dump(include={"run", "shard", "jobs", "fresh"}, exclude_defaults=True):
        raise ConfigError(f"--{min(idle)} without --check, which it belongs to", hint="meansparse models --check")
    if text := list_models(selected, as_json=given.as_json, to_terminal=sys.stdout.isatty()):
        answer(text)


def train(flags: Flags, given: arguments.TrainArguments) -> None:
    """The path of the weights; exit code 75 where the time limit came first. Of several ranks the first answers."""
    settings, sources = resolve("train", TrainConfig, given.config, flags)
    from ..stages.train_together import train_together
    from ..stages.workers import rank_here

    path = train_together(settings, sources, given)
    if (rank := rank_here()) and rank.number > 0:
        return
    if path is None:
        raise typer.Exit(0 if settings.plan else UNFINISHED)
    _print_report(path, "train", given.as_json, path.with_name("model.safetensors"))


_OWN: tuple[Function, ...] = (sites, plot, table, reproduce, export, verify, report, compare, models, train)
FUNCTIONS = {name: partial(_do, name) for name in COMMANDS} | {function.__name__: function for function in _OWN}
"""What runs when a command is called: the function that has its name, else the stage."""
