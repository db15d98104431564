"""What ends a command from outside: Ctrl-C, the signals of batch systems, a limit of time.

Ctrl-C while modules are loaded, where an exception would be a traceback or lost: one line, and exit code 130.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import ConfigError

INTERRUPTED = 130
TERMINATED = 143
UNFINISHED = 75  # EX_TEMPFAIL: batch systems queue such a job again


class Stopped(KeyboardInterrupt):
    """A command is ended from outside: ``word`` says how, ``exit_code`` tells whoever started it."""

    def __init__(self, word: str = "interrupted", exit_code: int = INTERRUPTED) -> None:
        super().__init__(word)
        self.word, self.exit_code = word, exit_code


def terminate(number: int, frame: FrameType | None) -> None:
    """A handler for SIGTERM and SIGUSR1, with which a batch system announces that it is about to kill."""
    raise Stopped("terminated", TERMINATED)


@contextmanager
def time_limit(minutes: float | None, *, fresh: bool) -> Iterator[None]:
    """Raise ``Stopped`` after so many minutes; what is finished by then is on disk."""
    if minutes is None:
        yield
        return
    if not minutes > 0:
        raise ConfigError(f"--time-limit {minutes:g}; expected minutes, above 0", hint="for an hour: --time-limit 60")
    if fresh:
        raise ConfigError(
            "--fresh with --time-limit: the same command, queued again, would begin anew each time",
            hint="run it once with --fresh alone, or remove the run folder, and leave --fresh out",
        )

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped at the time limit", UNFINISHED)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(60 * minutes, 1e9))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def quit_at_once(number: int, frame: FrameType | None) -> None:
    """A handler for before there is work to leave in order."""
    os.write(2, b"interrupted: nothing finished was lost; the same command goes on from here\n")
    os._exit(INTERRUPTED)


def raise_unless_loading(number: int, frame: FrameType | None) -> None:
    """A handler for work: KeyboardInterrupt, unless a module is being loaded."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            quit_at_once(number, frame)
        frame = frame.f_back
    raise KeyboardInterrupt


@contextmanager
def ctrl_c_quits() -> Iterator[None]:
    """Until the end, or for good where that is the end of the process; a handler of somebody else's is left alone."""
    is_ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, quit_at_once)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
