"""One lock for run folders and the cache of weights, released by the system however its holder ends."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def locked(file: Path, *, shared: bool = False, wait: bool = False) -> Iterator[str | None]:
    """Hold ``file`` alone; or, ``shared``, together with others who do, as long as nobody has it alone.

    Yields None, or why there is no lock: nothing then keeps others away. Raises BlockingIOError where another holds the
    file and ``wait`` is False, OSError where it cannot be opened.
    """
    # "a+": a network folder gives a shared lock only on a file open for reading, an exclusive one on one for writing
    with open(file, "a+") as handle:
        yield _lock(handle, shared, wait)


def _lock(handle: IO[str], shared: bool, wait: bool) -> str | None:
    try:
        import fcntl
    except ImportError:
        return "no locks on this system"
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if not wait and error.errno in (errno.EAGAIN, errno.EACCES):
            raise BlockingIOError(error.errno, error.strerror) from error
        # such as ENOSYS of a file system that was mounted without locks, which is common on clusters
        return error.strerror or str(error)
    return None
