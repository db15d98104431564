"""Commands typed in this process, through the command line alone, and stopped where a scene asks for it."""

import fnmatch
import functools
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import yaml
from typer.testing import CliRunner, Result

INTERRUPTED = 130
ENVIRONMENT = {"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}


def type_command(command: str) -> Result:
    """What ``meansparse COMMAND`` does in the current folder."""
    from meansparse_cli.cli import app

    words = shlex.split(command)
    with patch.object(sys, "argv", ["meansparse", *words]):
        return CliRunner().invoke(app, words, env=ENVIRONMENT, prog_name="meansparse")


def type_line(command: str) -> str:
    """A command, its stdout and its exit code, as a transcript shows them. Raises AssertionError if it fails."""
    result = type_command(command)
    assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
    return f"$ meansparse {command}\n{result.stdout}"


@contextmanager
def stopped_after(pattern: str, count: int) -> Iterator[None]:
    """Ctrl-C once the ``count``-th file whose name matches has been moved into its place.

    The clock runs fast meanwhile: what is saved every so many seconds is saved at every chance.
    """
    move, clock, n_seen, n_asked = os.replace, time.monotonic, 0, 0

    def replace(source: str, target: str) -> None:
        nonlocal n_seen
        move(source, target)
        n_seen += fnmatch.fnmatch(Path(target).name, pattern)
        if n_seen == count:
            raise KeyboardInterrupt

    def monotonic() -> float:
        nonlocal n_asked
        n_asked += 1
        return clock() + 60 * n_asked

    with patch.object(os, "replace", replace), patch.object(time, "monotonic", monotonic):
        yield


@contextmanager
def counted() -> Iterator[list[int]]:
    """How many images went through convolutions: work, whatever module asked for it. The list's one entry."""
    n = [0]

    def add(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, torch.nn.Conv2d):
            n[0] += len(inputs[0])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(add)
    try:
        yield n
    finally:
        handle.remove()


@functools.cache
def weights_place() -> Path:
    """Where the weights of the model ``digits`` are, as its report says."""
    with tempfile.TemporaryDirectory() as folder:
        result = type_command(f"fetch --model digits --run {folder}")
        assert result.exit_code == 0, result.output
        return Path(yaml.safe_load((Path(folder) / "fetch.yaml").read_text())["results"]["files"][0]["path"])


def set_out(folder: Path) -> None:
    """Go to ``folder``, and put there what the scenes' commands name."""
    shutil.copy(Path(__file__).parent / "networks.py", folder)
    os.chdir(folder)
    write_colours(Path("colours.npz"), 1600)
    write_colours(Path("few.npz"), 160)


def write_colours(path: Path, n: int) -> None:
    """n images of 3 x 4 x 4 in four classes: a red, a green, a blue tint, and none; by a formula, no generator."""
    numbers = np.arange(n * 4 * 4 * 3, dtype=np.uint64) * np.uint64(2654435761) >> np.uint64(7)
    x, y = (numbers % np.uint64(160)).astype(np.uint8).reshape(n, 4, 4, 3), np.arange(n) % 4
    for colour in range(3):
        x[y == colour, :, :, colour] += 40
    np.savez(path, x=x, y=y)
