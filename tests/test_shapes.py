"""Rules other than the paper's for what lies near the mean: known answers, gradients, the whole way to a report."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import CliRunner

from meansparse_cli.cli import app
from meansparse_cli.errors import ConfigError
from meansparse_cli.operator import checkpoint
from meansparse_cli.operator.active import backward_rule, example_alphas_set
from meansparse_cli.operator.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, sparsify
from meansparse_cli.operator.module import MeanSparse
from meansparse_cli.operator.shapes import HARD, SHAPES
from meansparse_cli.operator.statistics import ChannelStatistics
from meansparse_cli.settings import stages
from meansparse_cli.sites.find import find_sites
from tests.conftest import write_quick_network

DISTANCES = [-2.0, -1.0, -0.75, -0.25, 0.0, 0.25, 0.75, 1.0, 2.0]
KNOWN = {  # of distances above zero, at a threshold of 1
    "soft": [0.0, 0.0, 0.0, 1.0],
    "garrote": [0.0, 0.0, 0.0, 1.5],
    "firm": [0.0, 0.5, 1.0, 2.0],
    "half": [0.125, 0.375, 0.5, 2.0],
    "edge": [1.0, 1.0, 1.0, 2.0],
    "widen": [0.5, 1.0, 1.0, 2.0],
}


def test_every_list_of_shapes_is_the_same() -> None:
    assert get_args(checkpoint.Shape) == get_args(stages.Shape) == (HARD, *SHAPES)
    assert {*KNOWN, "smooth"} == set(SHAPES)


@pytest.mark.parametrize("shape", KNOWN)
def test_known_answers_are_odd_around_the_mean(shape: str) -> None:
    out = SHAPES[shape](torch.tensor(DISTANCES), torch.tensor(1.0)).tolist()
    assert out[5:] == KNOWN[shape]
    assert out[:4] == [-value for value in reversed(KNOWN[shape])]
    assert out[4] == 0


def test_the_smooth_band_has_no_edge_and_leaves_far_features_alone() -> None:
    d = torch.linspace(-5, 5, 2001, dtype=torch.float64)
    out = SHAPES["smooth"](d, torch.tensor(1.0))
    assert (out.diff() >= 0).all() and (out.diff() < 0.01).all()
    torch.testing.assert_close(out[[0, 1000, -1]], d[[0, 1000, -1]])


def operator(shape: str, alpha: float = 0.5) -> tuple[MeanSparse, Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = MeanSparse(torch.tensor([0.3, -0.2, 1.0]), torch.tensor([1.0, 0.5, 0.0]), alpha, shape=shape)
    return made, torch.randn(6, 3, 4, generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_of_alpha_zero_and_a_channel_without_variance_are_the_base_model(shape: str) -> None:
    made, x = operator(shape)
    made.example_alphas = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.5, 0.5])
    asked = x.clone().requires_grad_()
    for rule in ("true", "identity", "soft:0.1"):
        with backward_rule(made, rule):
            out = made(asked)
        (grad,) = torch.autograd.grad(out.sum(), asked)
        assert torch.equal(out[[0, 2]], x[[0, 2]])
        torch.testing.assert_close(out[:, 2], x[:, 2])
        assert (grad[[0, 2]] == 1).all()
        torch.testing.assert_close(grad[:, 2], torch.ones_like(grad[:, 2]))
        assert not torch.equal(out[1, :2], x[1, :2])


@pytest.mark.parametrize("shape", SHAPES)
def test_backward_rules_change_the_gradient_alone(shape: str) -> None:
    made, x = operator(shape)
    asked, own = x.clone().requires_grad_(), made(x)
    for rule in ("identity", "soft:0.2"):
        with backward_rule(made, rule):
            out = made(asked)
        assert torch.equal(out, own)
        (grad,) = torch.autograd.grad(out.sum(), asked)
        if rule == "identity":
            assert (grad == 1).all()
        else:  # the slope across 0.2 std to either side
            half = 0.2 * made.std.view(1, 3, 1)
            slope = (made(x + half) - made(x - half)) / (2 * half)
            torch.testing.assert_close(grad[:, :2], slope[:, :2])
    asked = x[:, :2].double().flatten().requires_grad_()  # autograd's own derivative, away from kinks
    f: Any = SHAPES[shape]
    assert torch.autograd.gradcheck(lambda d: f(d, torch.tensor(0.37, dtype=torch.float64)), asked, eps=1e-7)


def statistics_of(network: torch.nn.Module) -> Checkpoint:
    sites = find_sites(network, torch.rand(2, 3, 8, 8))
    found = [ChannelStatistics(9, torch.zeros(s.channels).double(), torch.ones(s.channels).double()) for s in sites]
    return Checkpoint(tuple(sites), tuple(found), "pooled", 0.4)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 3), torch.nn.ReLU(), torch.nn.Flatten()
    )


def test_shape_and_channel_weights_go_through_a_file_and_change_the_id(tmp_path: Path) -> None:
    plain = statistics_of(network())
    weights = (torch.tensor([0.0, 0.25, 0.5, 1.0]).double(), torch.full((5,), 0.5).double())
    one = replace(plain, shape="firm", channel_weights=weights)
    save_checkpoint(tmp_path / "one.safetensors", one)
    again = load_checkpoint(tmp_path / "one.safetensors")
    assert again.shape == "firm" and again.channel_weights is not None
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again.channel_weights, weights, strict=True))
    ids = {plain.options_id(), one.options_id(), replace(one, shape="hard").options_id()}
    ids.add(replace(one, channel_weights=weights[:1] + (weights[1] / 2,)).options_id())
    assert len(ids) == 4 and again.options_id() == one.options_id()
    assert one.in_words(0.4) == "alpha 0.4, learned for each channel, shape firm"
    with pytest.raises(ConfigError, match="shape 'round'"):
        replace(plain, shape="round")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one a channel"):
        replace(plain, channel_weights=(weights[0], weights[0]))


def test_a_channel_has_the_threshold_of_its_weight_and_a_soft_edge_of_its_own_std() -> None:
    weights = (torch.tensor([0.0, 0.25, 0.5, 1.0]).double(), torch.ones(5).double())
    model = sparsify(network(), replace(statistics_of(network()), channel_weights=weights))
    band: Any = model.at(model.sites[0])
    torch.testing.assert_close(band.threshold(band.std), torch.tensor([0.0, 0.1, 0.2, 0.4]))
    x = torch.full((1, 4, 1, 1), 0.15)
    assert band(x).flatten().tolist() == [pytest.approx(0.15)] * 2 + [0.0, 0.0]
    whole = MeanSparse(torch.zeros(4), torch.tensor([0.25, 0.25, 0.5, 1.0]), 0.4)  # the same thresholds
    slopes = []
    for made, rule in ((band, "soft:0.1"), (whole, "soft:0.1")):
        asked = x.clone().requires_grad_()
        with backward_rule(made, rule):
            slopes.append(torch.autograd.grad(made(asked).sum(), asked)[0].flatten())
    assert slopes[0][3] == slopes[1][3]
    assert slopes[0][2] != slopes[1][2], "an edge of 0.1 of the channel's own std, not of its weighted one"
    with example_alphas_set(model, torch.tensor([0.0, 0.4])):
        images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
        assert torch.equal(model(images)[0], network()(images)[0])


def test_shape_is_an_option_of_the_commands_and_a_key_of_the_report_where_it_was_given(tmp_path: Path) -> None:
    def done(*arguments: object) -> None:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output

    run = tmp_path / "run"
    done("fetch", *write_quick_network(tmp_path), "--run", run)
    done("calibrate", "--run", run, "--n-examples", 100)
    attack = ("--attack", "apgd-margin-5", "--eps", "8/255", "--n-examples", 20)
    common = ("--alphas", "0.3", *attack)
    outcomes = {}
    for shape in (None, "widen"):
        done("measure", "--run", run, "--name", f"{shape}", *common, *(("--shape", shape) if shape else ()))
        report = yaml.safe_load((run / "measurements" / f"{shape}" / "measure.yaml").read_text())
        assert report["config"]["settings"].get("shape") == shape
        outcomes[shape] = report["results"]["rows"]
    assert outcomes[None][0] == outcomes["widen"][0], "the base model is the same"
    done("evaluate", "--run", run, "--alpha", 0.3, "--shape", "widen", *attack, "--no-doubts")
    evaluated = yaml.safe_load((run / "evaluate.yaml").read_text())["results"]
    assert evaluated["operator"] == "alpha 0.3, shape widen"
    clean = next(row for row in evaluated["comparisons"] if row["name"] == "clean")
    assert clean["sparsified_accuracy"] == outcomes["widen"][1]["clean"]["accuracy"]
