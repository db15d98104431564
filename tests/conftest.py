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

from meansparse_cli.operator.statistics import ChannelSums, merge, of_batch, on_cpu

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the commands that tests start


def added(sums: ChannelSums, batch: Tensor, channel_axis: int) -> ChannelSums:
    """Statistics after one batch more."""
    of_this = of_batch(batch, channel_axis, len(sums.mean), sums.estimator)
    return merge(sums, *on_cpu([of_this]))


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


SPLITS = ("calibration", "held-out", "test")
QUICK_NETWORK = '''
import os, time, torch
from pathlib import Path
from torch import nn


class Quick(nn.Module):
    """One convolution; each forward pass can be made slow, so that a test can kill it in the middle."""

    def __init__(self):
        super().__init__()
        self.conv, self.act, self.head = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Linear(288, 10)

    def forward(self, x):
        time.sleep(float(os.environ.get("SLOW", 0)))
        return self.head(self.act(self.conv(x)).flatten(1))


def quick():
    network = Quick()
    network.load_state_dict(torch.load(Path(__file__).with_name("quick.pt")))
    return network
'''


def write_quick_network(folder: Path) -> list[str]:
    """Options for a network of one site that knows the digits, in a tenth of the time of the embedded one.

    The digits are a file, so that no command has to import scikit-learn.
    """
    from meansparse_cli.data.examples import stack_examples
    from meansparse_cli.data.splits import load_split

    (folder / "quick.py").write_text(QUICK_NETWORK)
    names: dict[str, type[nn.Module]] = {}
    exec(QUICK_NETWORK, names)
    torch.manual_seed(0)
    network = names["Quick"]()
    x, y = (torch.cat(p) for p in zip(*(stack_examples(load_split("digits", None, s)) for s in SPLITS), strict=True))
    np.savez(folder / "digits.npz", x=(255 * x).round().byte().permute(0, 2, 3, 1).numpy(), y=y.numpy())
    with torch.no_grad():
        features = network.act(network.conv(x)).flatten(1)
        targets = F.one_hot(y, 10) - 0.1
        ridge = features.T @ features + 3 * torch.eye(288)
        network.head.weight.copy_(torch.linalg.solve(ridge, features.T @ targets).T * 10)
        network.head.bias.zero_()
    torch.save(network.state_dict(), folder / "quick.pt")
    return ["--model", f"{folder / 'quick.py'}:quick", "--dataset", str(folder / "digits.npz")]
