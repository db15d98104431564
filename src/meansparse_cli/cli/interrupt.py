"""Ctrl-C while modules are loaded, where an exception would be a traceback or lost: one line, and exit code 130."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130


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
