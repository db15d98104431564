"""Freed memory stays with the process: a tensor taken again costs no page faults."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from meansparse_cli.runs.device import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
for _ in range(20):  # the first few are laid side by side, until the heap has room for one between the small blocks
    torch.ones(16 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):
    torch.ones(16 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(what: str, **environment: str) -> tuple[str, int]:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, what], capture_output=True, text=True, check=True, env=_environment(environment)
    )
    said, faults = result.stdout.split()
    return said, int(faults)


def _environment(more: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | more


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_a_tensor_taken_again_costs_no_page_faults() -> None:
    said, faults = run("keep")
    _, faults_by_default = run("leave")
    assert said == "True"
    assert faults_by_default > 1000
    assert faults < faults_by_default / 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_the_environment_decides_where_it_has_a_say() -> None:
    said, _ = run("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert said == "False"
