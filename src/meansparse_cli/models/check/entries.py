"""Entries of the zoo built with random weights and put through ``check_model``, one by one or several at a time.

Nothing is downloaded and no GPU is needed: the architectures come from the installed robustbench.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...data.facts import KNOWN_DATASETS
from .. import zoo
from ..names import ZooEntry
from ..published_sites import take_out
from ..robustbench import quietly
from .network import check_model

N_IMAGES, SEED = 2, 0

Row = dict[str, Any]
"""The entry's name, dataset and threat, what was found, the broken promises under ``problems``, and ``seconds``."""


def check_entry(entry: ZooEntry) -> Row:
    """One row of the report. Whatever goes wrong becomes one of the row's ``problems``."""
    started = time.monotonic()
    facts: dict[str, Any] = {}
    torch.manual_seed(SEED)
    shape = KNOWN_DATASETS[entry.dataset].image_shape
    images = torch.rand((N_IMAGES, *shape), generator=torch.Generator().manual_seed(SEED))
    # what these print and warn of is the architectures' own affair
    with quietly(), tempfile.TemporaryDirectory() as scratch:
        try:
            # as it is loaded, without weights; no name holds the network, so that it can go before the next one comes
            facts, problems = check_model(
                take_out(zoo.build_zoo_model(entry)), images, Path(scratch) / "meansparse.safetensors"
            )
        except Exception as error:  # the architectures are other people's code
            problems = [f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"]
    gc.collect()
    return asdict(entry) | facts | {"problems": problems, "seconds": round(time.monotonic() - started, 1)}


def check_entries(entries: Sequence[ZooEntry], n_jobs: int) -> Iterator[tuple[Row, float]]:
    """Rows as they are done, each with the peak memory so far in GiB: that of all processes, each at its own peak."""
    if n_jobs == 1:
        for entry in entries:
            yield check_entry(entry), _peak_rss_gib()
        return
    n_threads = max(1, (os.cpu_count() or 1) // n_jobs)
    peaks: dict[int, float] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_jobs, context, initializer=torch.set_num_threads, initargs=(n_threads,)) as workers:
        pending = [workers.submit(_check_in_worker, entry) for entry in entries]
        try:
            for done in as_completed(pending):
                row, process, peak = done.result()
                peaks[process] = peak
                yield row, sum(peaks.values()) + _peak_rss_gib()
        finally:
            workers.shutdown(wait=False, cancel_futures=True)


def _check_in_worker(entry: ZooEntry) -> tuple[Row, int, float]:
    return check_entry(entry), os.getpid(), _peak_rss_gib()


def _peak_rss_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
