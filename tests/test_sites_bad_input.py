"""Models that have no fixed sites, or do not run: named clearly, and left as they were."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from meansparse_cli.errors import DataError, MeanSparseError, SiteError
from meansparse_cli.operator.calibration import calibrate_channels
from meansparse_cli.operator.insertion import insert
from meansparse_cli.operator.module import MeanSparse
from meansparse_cli.sites.find import find_sites

IMAGES = torch.linspace(0, 1, 8).expand(2, 3, 8, 8).contiguous()  # dark on the left: the mirror image is another


@contextmanager
def left_alone(net: nn.Module) -> Iterator[None]:
    """Hooks, the mode of each module, children, buffers and parameters."""

    def facts() -> list[tuple[object, ...]]:
        return [
            (name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), list(m._modules))
            for name, m in net.named_modules()
        ]

    before, state = facts(), {k: v.clone() for k, v in net.state_dict().items()}
    yield
    assert facts() == before
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())


def half_frozen(net: nn.Module) -> nn.Module:
    """Some modules in training mode, one not, as when batch norms are frozen."""
    net.train()
    for child in list(net.children())[:1]:
        child.eval()
    return net


class Counting(nn.Module):
    """Writes to a buffer in every forward pass, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.register_buffer("n_calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        return F.relu(self.conv(x)).mean((2, 3))


def test_a_good_model_is_left_alone_too() -> None:
    net = half_frozen(Counting())
    pictures = Subset(TensorDataset(torch.rand(8, 3, 8, 8), torch.zeros(8, dtype=torch.long)), range(8))
    with left_alone(net):
        sites = find_sites(net, IMAGES)
        calibrate_channels(net, sites, pictures, batch_size=4)  # type: ignore[arg-type]
    modes = [m.training for m in net.modules()]
    wrapper = insert(net, sites, [MeanSparse(torch.zeros(4), torch.ones(4))])
    assert [m.training for m in net.modules()] == modes and wrapper.training


def test_forward_fails_on_this_image_size() -> None:
    net = half_frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(10, 2)))
    with (
        left_alone(net),
        pytest.raises(DataError, match=r"failed in 3 on images of shape \(2, 3, 8, 8\): RuntimeError"),
    ):
        find_sites(net, IMAGES)


class Refuses(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != 32:
            raise AssertionError(f"image size {x.shape[-1]}, expected 32")
        return F.relu(x)


def test_forward_refuses_this_image_size_in_its_own_words() -> None:
    with pytest.raises(DataError, match=r"AssertionError: image size 8, expected 32\nis this the model's data set"):
        find_sites(Refuses(), IMAGES)


def test_no_activation() -> None:
    net = half_frozen(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    with left_alone(net), pytest.raises(SiteError, match="no activation"):
        find_sites(net, IMAGES)


class SometimesTwice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x - 0.5)
        if x[..., 0].sum() > x[..., -1].sum():
            x = F.relu(x - 0.1)
        return x.mean((2, 3))


class SometimesAnother(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (F.relu if x[0, 0, 0, 0] > 0.5 else F.silu)(x).mean((2, 3))


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (
            SometimesTwice,
            r"1 activations on one batch, 2 on another; .* one calls \(model\) \(relu\(\)\), the other \(model\)#0",
        ),
        (SometimesAnother, r"one calls \(model\) \(silu\(\)\), the other \(model\) \(relu\(\)\)"),
    ],
)
def test_sites_that_depend_on_the_input(build: type[nn.Module], says: str) -> None:
    net = half_frozen(build())
    with left_alone(net), pytest.raises(SiteError, match=f"depend on the input: .*{says}"):
        find_sites(net, IMAGES)


class MovesItsChannels(nn.Module):
    """Channels-last on some images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        first = bool(x[0, 0, 0, 0] < 0.5)
        x = self.conv(x)
        return self.act(x if first else x.permute(0, 2, 3, 1)).mean((1, 2))


class ChangesItsWidth(nn.Module):
    """Drops channels on some images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 8, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        n = 8 if x[0, 0, 0, 0] < 0.5 else 6
        return self.act(self.conv(x)[:, :n]).mean((2, 3))


class BatchAsChannels(nn.Module):
    """The batch axis last: what is a channel of the first layer is an image of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x.mean((2, 3)).unsqueeze(0)[:, :, :1].reshape(1, -1)).T


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (
            MovesItsChannels,
            "act has a dynamic layout: 8 channels on axis 1 of 4 on one batch, 8 channels on axis 3 of 4",
        ),
        (ChangesItsWidth, "act has a dynamic layout: 8 channels on axis 1 of 4 on one batch, 6 channels"),
        (BatchAsChannels, "act has a dynamic layout: 2 channels on axis 1 of 2 on one batch, 3 channels"),
    ],
)
def test_dynamic_layout(build: type[nn.Module], says: str) -> None:
    net = half_frozen(build())
    with left_alone(net), pytest.raises(SiteError, match=says):
        find_sites(net, IMAGES)


class RareBranch(nn.Module):
    """The same on the images that sites are found with; bright ones go another way."""

    def __init__(self, usual: int, rare: int) -> None:
        super().__init__()
        self.conv, self.act, self.usual, self.rare = nn.Conv2d(3, 4, 3), nn.ReLU(), usual, rare

    def forward(self, x: Tensor) -> Tensor:
        is_bright = bool(x.amax() > 2)
        x = self.conv(x)
        for _ in range(self.rare if is_bright else self.usual):
            x = self.act(x)
        return x.mean((2, 3))


@pytest.mark.parametrize(
    ("usual", "rare", "says"),
    [
        (1, 2, "act was reached 2 times"),
        (1, 0, "act was reached 0 times"),
        (2, 1, "act#1 was reached 0 times"),
        (2, 3, "called 3 times"),
    ],
)
def test_a_branch_that_only_calibration_meets(usual: int, rare: int, says: str) -> None:
    net = half_frozen(RareBranch(usual, rare))
    images = torch.rand(12, 3, 8, 8)
    images[9] += 3
    pictures = Subset(TensorDataset(images, torch.zeros(12, dtype=torch.long)), range(12))
    with left_alone(net), pytest.raises(SiteError, match=says) as raised:
        calibrate_channels(net, find_sites(net, IMAGES), pictures, batch_size=4)  # type: ignore[arg-type]
    assert "depend on its input" in str(raised.value)


def test_a_model_that_has_operators_already() -> None:
    net = Counting()
    sites = find_sites(net, IMAGES)
    insert(net, sites, [MeanSparse(torch.zeros(4), torch.ones(4))])
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten())
    model = insert(pooled, find_sites(pooled, IMAGES), [MeanSparse(torch.zeros(4), torch.ones(4))])
    for sparsified in (model, pooled):
        with pytest.raises(SiteError, match="operators already"):
            find_sites(sparsified, IMAGES)


def test_exit_codes() -> None:
    errors: list[type[MeanSparseError]] = [DataError, SiteError]
    assert [e.exit_code for e in errors] == [7, 8]
