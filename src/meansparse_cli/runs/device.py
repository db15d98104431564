"""The device that a stage computes on; on a CPU its threads, and the memory that stays with the process."""

import ctypes
import logging
import math
import os
import platform
from contextlib import suppress
from pathlib import Path

import torch

from ..errors import ConfigError

log = logging.getLogger(__name__)

# <malloc.h>
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
AT_MOST = 1 << 30
ON_A_CPU, ON_A_GPU = 256, 1024


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
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # where streams and graphs are made
    if name == "cpu":
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > (n := cores_here()):
            torch.set_num_threads(n)
    return name


def batch_size_on(device: str) -> int:
    """Images in a forward pass, at most, where nothing else is asked for.

    A GPU takes ``ON_A_GPU``, or half of it, and again half, where its memory ends (``operator.fitting``). Not more:
    what is being attacked when a command is killed is attacked again.
    """
    return ON_A_GPU if device.startswith("cuda") else ON_A_CPU


def cores_here(control_groups: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")) -> int:
    """How many cores this process may use: by its affinity, all that torch knows, and by its control groups."""
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError):
        for line in mine.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            group = control_groups / controllers / path.lstrip("/")
            for folder in (group, *group.parents) if controllers == "" or "cpu" in controllers.split(",") else ():
                n = min(n, _quota(folder) or n)
                if folder in (control_groups, control_groups / controllers):
                    break
    return n


def _quota(group: Path) -> int | None:
    """Cores by the quota of one control group, rounded up; None where it has none."""
    with suppress(OSError, ValueError, ZeroDivisionError):
        if (file := group / "cpu.max").exists():  # version 2: "200000 100000", or "max 100000"
            quota, period = file.read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return max(1, math.ceil(int(quota) / int(period))) if int(quota) > 0 else None
    return None


def keep_freed_memory() -> bool:
    """Tell glibc not to hand blocks of up to 1 GiB back to the kernel; did it take that?

    An attack takes as much again at its next step; by default each large tensor is mapped afresh and its pages zeroed.
    Whoever has set MALLOC_MMAP_THRESHOLD_ or MALLOC_TRIM_THRESHOLD_ in the environment has decided already.
    """
    is_decided = {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & os.environ.keys()
    if is_decided or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_THRESHOLD, AT_MOST)) and bool(mallopt(M_TRIM_THRESHOLD, AT_MOST))
