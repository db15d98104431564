"""The device that a stage computes on, and on a CPU the memory that stays with the process."""

import ctypes
import logging
import os
import platform

import torch

from ..errors import ConfigError

log = logging.getLogger(__name__)

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
AT_MOST = 1 << 30


def pick_device(name: str) -> str:
    """``auto`` is the first GPU, under ``torchrun`` this rank's; else the CPU, on which freed memory stays with us."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cuda" and (rank := os.environ.get("LOCAL_RANK", "")).isdecimal():
            n_gpus = torch.cuda.device_count()
            name = f"cuda:{int(rank) % n_gpus}"
            if int(rank) == n_gpus:  # said once, by the first that has none of its own
                log.warning(f"more ranks than the {n_gpus} GPUs of this machine: some share one")
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {error}", hint="--device auto, cpu or cuda:0") from error
    if name == "cpu":
        keep_freed_memory()
    return name


def keep_freed_memory() -> bool:
    """Tell glibc not to hand blocks of up to 1 GiB back to the kernel; did it take that?

    A CPU attack takes as much again at its next step; by default each large tensor is mapped afresh and its pages
    zeroed. Whoever has set MALLOC_MMAP_THRESHOLD_ or MALLOC_TRIM_THRESHOLD_ in the environment has decided already.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, AT_MOST)) and bool(mallopt(M_TRIM_THRESHOLD, AT_MOST))
