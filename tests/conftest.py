"""Small networks and data of our own; every test is on the CPU, without network, on one thread."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import Result

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start


def said(what: Result | CompletedProcess[str] | str) -> str:
    """The stderr of a command, or a text, in one line: without the box around an error and the breaks of its width."""
    text = what if isinstance(what, str) else what.stderr
    return " ".join(re.sub("[─│╭╮╰╯]", " ", text).split())


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache, nor sees the user's data folder."""
    monkeypatch.setenv("MEANSPARSE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("MEANSPARSE_DATA", raising=False)


@pytest.fixture(scope="session", autouse=True)
def _one_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """All runs of a session are of one user, who fetched them; and not of whoever starts the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """The suite fails if it leaves files in the checkout; with ``-n``, each process looks after its last test."""
    root = Path(__file__).parent.parent
    ignored = {".pytest_cache", ".mypy_cache", ".ruff_cache", "__pycache__", "runs"}
    before = {p.name for p in root.iterdir()}
    yield
    left = {p.name for p in root.iterdir()} - before - ignored
    assert not left, f"tests left {sorted(left)} in {root}"


class ModuleNet(nn.Module):
    """Activations as modules, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.act, self.relu = nn.GELU(), nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.conv1(x)))
        x = self.act(self.conv2(x))
        x = self.relu(self.conv2(x) + x)
        return self.head(x.mean((2, 3)))


class FunctionNet(nn.Module):
    """Activations as function calls only, in several spellings, ending channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.linear, self.head = nn.Linear(8, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = torch.relu_(self.conv2(x))
        x = F.silu(self.conv2(x), inplace=True)
        x = F.gelu(self.linear(x.permute(0, 2, 3, 1)))
        return self.head(x.mean((1, 2)))


@pytest.fixture(params=[ModuleNet, FunctionNet], ids=["modules", "functions"])
def network(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(1)
    net: nn.Module = request.param()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return net.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 8, 8)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """120 images of 3 x 8 x 8 in three classes, as an .npz."""
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = rng.integers(0, 120, (120, 8, 8, 3)).astype(np.uint8)
    x[np.arange(120), :, :, y] += 100
    path = tmp_path / "colours.npz"
    np.savez(path, x=x, y=y)
    return path
