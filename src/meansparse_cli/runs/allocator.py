"""Memory that a CPU attack frees stays with the process, since the next step takes as much again."""

from __future__ import annotations

import ctypes
import os
import platform

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
AT_MOST = 1 << 30


def keep_freed_memory() -> bool:
    """Tell glibc not to hand blocks of up to 1 GiB back to the kernel; did it take that?

    By default it maps each large tensor afresh and the kernel zeroes its pages, step after step. Whoever has set
    MALLOC_MMAP_THRESHOLD_ or MALLOC_TRIM_THRESHOLD_ in the environment has decided already.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, AT_MOST)) and bool(mallopt(M_TRIM_THRESHOLD, AT_MOST))
