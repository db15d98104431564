"""Who has which shard of a stage: the processes of ``--jobs``, the ranks of ``torchrun``.

Each worker is a shard like those of ``--shard I/N``; the first one, once all are done, is followed by the command
without a shard, which gathers. A worker that dies costs what a kill costs, whatever the number of those that go on.
"""

import gc
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from ..errors import ConfigError, MeanSparseError
from ..reporting.console import console, heartbeat, note
from ..runs.device import cores_here
from ..settings.arguments import StageArguments, TrainArguments

MEETING = timedelta(minutes=10)
"""How long ranks look for each other at the beginning."""
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
OCCASION = "MEANSPARSE_OCCASION"
"""Tells apart the groups that the same ranks are in one after the other, each in processes of its own."""
PATIENCE = timedelta(days=365)
"""How long the ranks that are done wait for the others: torchrun ends them where one dies."""

T = TypeVar("T")
Work = Callable[[str], Any]
"""Does one shard, ``I/N``. It can be pickled."""


@dataclass(frozen=True)
class Rank:
    """One of ``world`` processes that torchrun started."""

    number: int
    world: int


def rank_here() -> Rank | None:
    """What torchrun says of this process; None where nobody did."""
    values = [os.environ.get(name) for name in RANK_VARIABLES]
    if not all(values):
        return None
    try:
        return Rank(*(int(str(value)) for value in values[:2]))
    except ValueError:
        return None


def as_ranks(rank: Rank, work: Work, prepare: Callable[[], None], gather: Callable[[], T]) -> T | None:
    """The shard of this rank; then, on the first, all of them gathered. The others return None."""
    import torch.distributed as distributed

    with met(rank):
        if rank.number == 0:
            prepare()
        distributed.barrier()
        with quiet(rank.number > 0):
            work(f"{rank.number + 1}/{rank.world}")
        distributed.barrier()
        return gather() if rank.number == 0 else None


@contextmanager
def met(rank: Rank, backend: str = "gloo") -> Iterator[None]:
    """A process group of all ranks, who wait for each other for long; what one of them raises has its number."""
    import torch.distributed as distributed
    from torch.distributed.rendezvous import rendezvous

    who = f"rank {rank.number} of {rank.world}"
    try:
        store, number, world = next(rendezvous("env://", timeout=MEETING))
        store = distributed.PrefixStore(os.environ.get(OCCASION, "once"), store)
        store.set_timeout(PATIENCE)
        distributed.init_process_group(backend, store=store, rank=number, world_size=world, timeout=PATIENCE)
    except (RuntimeError, ValueError, OSError) as error:
        where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConfigError(
            f"{who}: no other ranks at {where}: {str(error).splitlines()[0]}",
            hint="are all nodes up, and is this address right? torchrun --rdzv-endpoint HOST:PORT",
        ) from error
    try:
        yield
    except MeanSparseError as error:
        error.message = f"{who}: {error.message}"
        raise
    gc.collect()  # a DistributedDataParallel, in a cycle, holds threads of the group that would abort at the exit
    distributed.destroy_process_group()  # not after an error: it would wait for ranks that wait for this one


def as_local_ranks(n: int, work: Work, *, on_gpu: bool) -> None:
    """``in_processes``, where each process is told what torchrun would tell it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    in_processes(n, partial(_as_local_rank, work, port), on_gpu=on_gpu)


def _as_local_rank(work: Work, port: int, shard: str) -> None:
    number, world = (int(part) for part in shard.split("/"))
    os.environ |= {"RANK": f"{number - 1}", "WORLD_SIZE": f"{world}", "LOCAL_RANK": f"{number - 1}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}
    work(shard)


def in_processes(n: int, work: Work, *, on_gpu: bool) -> None:
    """All shards, each in a process of its own, of which the first shows how far it is; the first error ends all."""
    n_cores = cores_here()
    if n_cores < n and not on_gpu:
        note(f"--jobs {n}: there are {n_cores} cores, so that workers wait for each other")
    spawn, told = multiprocessing.get_context("spawn"), (console.quiet, heartbeat.every)
    left = {}
    try:
        for i in range(n):
            ours, theirs = spawn.Pipe(duplex=False)
            n_threads = None if on_gpu else max(1, n_cores // n)
            process = spawn.Process(target=_worker, args=(theirs, work, i, n, n_threads, told))
            process.start()
            theirs.close()
            left[process.sentinel] = i + 1, process, ours
        while left:
            for sentinel in wait(list(left)):
                number, process, ours = left.pop(sentinel)  # type: ignore[arg-type]
                process.join()
                if process.exitcode != 0:
                    raise _failure(f"worker {number} of {n}", process.exitcode, ours)
    finally:
        for _, process, _ in left.values():
            process.terminate()
            process.join()


def _worker(pipe: Connection, work: Work, i: int, n: int, n_threads: int | None, told: tuple[bool, float]) -> None:
    """What process ``i`` of ``in_processes`` does: it ends with its parent, which alone hears Ctrl-C."""
    heartbeat.every = told[1]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["LOCAL_RANK"] = f"{i}"  # by which it takes a GPU of its own
    if n_threads is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(n_threads)
    try:
        with quiet(told[0] or i > 0):
            work(f"{i + 1}/{n}")
    except Exception as error:
        known = error if isinstance(error, MeanSparseError) else MeanSparseError(f"{type(error).__name__}: {error}")
        pipe.send((known.message, known.hint, known.exit_code))
        os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _failure(who: str, exit_code: int | None, pipe: Connection) -> MeanSparseError:
    message, hint, code = f"ended with exit code {exit_code}", None, MeanSparseError.exit_code
    if exit_code is not None and exit_code < 0:
        message = f"was ended by {signal.Signals(-exit_code).name}"
    if pipe.poll():
        with suppress(EOFError):
            message, hint, code = pipe.recv()
    again = "nothing finished was lost: the same command goes on, with any number of workers"
    failure = MeanSparseError(f"{who}: {message}", hint=hint or again)
    failure.exit_code = code
    return failure


@contextmanager
def quiet(is_quiet: bool) -> Iterator[None]:
    """Nothing is shown of what several do at a time, errors apart."""
    before, console.quiet = console.quiet, console.quiet or is_quiet
    try:
        yield
    finally:
        console.quiet = before


def refuse_fresh_plan(given: StageArguments) -> None:
    """Refuse a plan of what is thrown away first."""
    if given.fresh:
        raise ConfigError("--plan with --fresh, which throws away what is done", hint="leave one of them out")


def n_jobs(given: TrainArguments, device: str, rank: Rank | None) -> int | None:
    """How many processes are asked for; None: this one alone, or those of torchrun."""
    if given.devices is not None and given.devices != "all":
        raise ConfigError(f"--devices {given.devices}; expected all", hint="one of them is --device cuda:0")
    if given.devices == "all" and device != "auto":
        raise ConfigError(f"--devices all with --device {device}", hint="give one of them")
    jobs = given.jobs or (torch.cuda.device_count() if given.devices == "all" else 0) or None
    if rank and jobs:
        raise ConfigError("--jobs or --devices with torchrun", hint="leave it out: torchrun starts the workers")
    return jobs
