"""``meansparse`` itself: its commands in their order, errors in words with their exit code, what a signal ends."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import AttackError, DataError, MeanSparseError, StorageError
from ..foreign import first_line, visible
from ..reporting.console import console, heartbeat, note, show_error
from ..settings.commands import COMMANDS
from .commands import FUNCTIONS
from .interrupt import Stopped, ctrl_c_quits, quit_at_once, raise_unless_loading, terminate
from .options import typer_function

_Usage: Any = typer.BadParameter.__base__  # Typer's own or click's, by its version
_NO_MEMORY = ("OutOfMemoryError", "can't allocate memory", "not enough memory")
"""Signs of torch, which is not imported to print a help text."""
SPINS = "1000"
"""How often a thread of torch looks for work before it sleeps; by default 300,000 times, while others would compute."""


@contextmanager
def _signals_raise() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, terminate)
    if before[signal.SIGINT] in (quit_at_once, signal.default_int_handler):
        signal.signal(signal.SIGINT, raise_unless_loading)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_words(error: Exception) -> MeanSparseError:
    """An error that no part of the library foresaw."""
    if isinstance(error, OSError):
        return StorageError.of(error)
    is_memory = isinstance(error, MemoryError) or any(sign in f"{type(error).__name__} {error}" for sign in _NO_MEMORY)
    if is_memory:
        return AttackError(
            f"out of memory: {first_line(error)}",
            hint="lower --batch-size: the same command with it goes on, nothing finished was lost",
        )
    return MeanSparseError(
        f"{type(error).__name__}: {first_line(error)}",
        hint="nothing finished was lost; where it happened, to see or to report it: meansparse --debug COMMAND",
    )


def _of_another_command(error: Any) -> None:
    """Say which commands have an option that this one lacks."""
    if type(error).__name__ != "NoSuchOption":
        return
    field = error.option_name.removeprefix("--").replace("-", "_")
    having = [c.name for c in COMMANDS.values() if field in c.options and c.shown[field]["panel"] != "Arguments"]
    if having:
        error.message += f"; it is an option of {', '.join(having)}"


class _Group(TyperGroup):
    """Turns our errors into a message on stderr and their exit code; a traceback only with --debug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            os.getcwd()  # libraries that torch loads end the process where there is none
            with _signals_raise():
                return super().invoke(ctx)
        except MeanSparseError as error:
            failure = error
        except KeyboardInterrupt as stop:
            if ctx.params.get("debug"):
                raise
            how = stop if isinstance(stop, Stopped) else Stopped()
            again = "the same command without --fresh" if "--fresh" in sys.argv else "the same command"
            note(f"{how.word}: nothing finished was lost; {again} goes on from here")
            raise typer.Exit(how.exit_code) from None
        except _Usage as error:
            _of_another_command(error)
            error.args = (visible(str(error)),)
            vars(error)["message"] = visible(error.message)
            raise
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            failure = _in_words(error)
        except BaseException as stop:  # no code of ours ends in this way, but a network's may call sys.exit
            if isinstance(stop.__context__, BrokenPipeError):
                raise  # of rich: whoever read what it prints has seen enough
            failure = DataError(f"the model's own code ended the program ({type(stop).__name__}: {stop})")
        if ctx.params.get("debug"):
            raise failure
        show_error(failure)
        raise typer.Exit(failure.exit_code)


class _App(typer.Typer):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "OMP_WAIT_POLICY" not in os.environ:  # before torch is loaded, whose threads read it then
            os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
        with ctrl_c_quits():
            return super().__call__(*args, **kwargs)


app = _App(
    cls=_Group,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
    rich_markup_mode="rich",
    help="MeanSparse for adversarially trained image classifiers: fetch a model, calibrate its channel statistics, "
    "choose alpha on a held-out split, evaluate under attack.",
    epilog="One command for all four: meansparse run --model digits",
)


def _commit() -> str:
    """Of the checkout that this package is run from; empty where it is installed."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder.parents[1] / ".git").exists():
        return ""
    words = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"meansparse {__version__}" + (f" ({commit})" if (commit := _commit()) else ""))
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Errors and the result alone.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="A log line every 5 seconds, not 30.")] = False,
) -> None:
    """Options of every command."""
    if quiet:
        console.quiet, heartbeat.say = True, None
    if verbose:
        heartbeat.every = 5.0


for _command in COMMANDS.values():
    _examples = "\n\n".join(_command.examples)
    app.command(_command.name, help=_command.help, rich_help_panel=_command.group, epilog=_examples)(
        typer_function(_command, FUNCTIONS[_command.name])
    )
