"""Freed memory stays with the process: a tensor taken again costs no page faults."""

import os
import platform
import subprocess
import sys

import pytest

from meansparse_cli.runs.device import keep_freed_memory

PROGRAM = """
import resource, torch
from meansparse_cli.runs.device import keep_freed_memory
def faults():
    for _ in range(20):  # the first few are laid side by side, until the heap has room for one between the small blocks
        torch.ones(16 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_a_tensor_taken_again_costs_no_page_faults() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment
    )
    by_default, said, kept = result.stdout.split()
    assert said == "True"
    assert int(by_default) > 1000
    assert int(kept) < int(by_default) / 10


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"])
def test_the_environment_decides_where_it_has_a_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "131072")
    assert not keep_freed_memory()
