"""Pictures of what the operator does: the numbers behind them, and files that open."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from meansparse_cli.errors import ConfigError, SiteError
from meansparse_cli.operator.active import alpha_set
from meansparse_cli.operator.insertion import SparsifiedModel, insert
from meansparse_cli.operator.module import MeanSparse
from meansparse_cli.operator.observe import blocked_shares, channel_values, site_called
from meansparse_cli.reporting.operator_plots import draw_blocked, draw_histogram
from meansparse_cli.sites.find import find_sites


@pytest.fixture
def model() -> SparsifiedModel:
    net = nn.Sequential(nn.Identity(), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    net[0] = nn.Conv2d(3, 3, 1, groups=3, bias=False)
    nn.init.ones_(net[0].weight)  # the site sees the image itself
    sites = find_sites(net, torch.rand(2, 3, 2, 2))
    return insert(net, sites, [MeanSparse(torch.tensor([0.5, 0.0, 2.0]), torch.ones(3), 0.25)]).eval()


@pytest.fixture
def grey() -> Tensor:
    return torch.tensor([0.1, 0.3, 0.7, 0.9]).view(1, 1, 2, 2).expand(5, 3, 2, 2).contiguous()


def test_shares_count_what_is_replaced(model: SparsifiedModel, grey: Tensor) -> None:
    # channel 0: 0.3 and 0.7 of four; channel 1: 0.1; channel 2: none
    assert blocked_shares(model, grey, batch_size=2) == [pytest.approx(3 / 12)]
    with alpha_set(model, 0.0):
        assert blocked_shares(model, grey) == [0.0]


def test_a_channel_before_and_after(model: SparsifiedModel, grey: Tensor) -> None:
    values = channel_values(model, model.sites[0], 0, grey, batch_size=2)
    assert values.before.view(5, 4)[0].tolist() == pytest.approx([0.1, 0.3, 0.7, 0.9])
    assert values.after.view(5, 4)[4].tolist() == pytest.approx([0.1, 0.5, 0.5, 0.9])
    assert (values.mean, values.threshold) == (0.5, 0.25)
    with pytest.raises(ConfigError, match="channels 0 to 2"):
        channel_values(model, model.sites[0], 3, grey)
    with pytest.raises(SiteError, match="no site 'x'"):
        site_called(model.sites, "x")
    assert site_called(model.sites, "0") is site_called(model.sites, "1") is model.sites[0]  # by index, by name


def test_files_are_written_and_the_same_every_time(model: SparsifiedModel, grey: Tensor, tmp_path: Path) -> None:
    values = channel_values(model, model.sites[0], 2, torch.zeros_like(grey))  # a constant channel
    for folder in (tmp_path / "a", tmp_path / "b"):
        draw_blocked([0.25], model.sites, title="t", png=folder / "s.png", svg=folder / "s.svg")
        draw_histogram(values, title="t", png=folder / "h.png", svg=folder / "h.svg")
    for name in ("s.png", "s.svg", "h.png", "h.svg"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "h.png").read_bytes().startswith(b"\x89PNG")
