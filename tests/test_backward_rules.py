"""What a gradient meets at the operator: values never change, derivatives are the ones that were asked for."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from meansparse_cli.attacks.judge import CountedModel
from meansparse_cli.errors import ConfigError
from meansparse_cli.operator.active import (
    alpha_set,
    backward_rule,
    example_alphas_set,
    operators_off,
    progress_set,
)
from meansparse_cli.operator.checkpoint import Checkpoint, sparsify
from meansparse_cli.operator.function import mean_sparsify, parse_backward_rule
from meansparse_cli.operator.insertion import SparsifiedModel, insert
from meansparse_cli.operator.module import MeanSparse
from meansparse_cli.operator.statistics import ChannelStatistics
from meansparse_cli.sites.find import find_sites

MEAN, THRESHOLD = torch.tensor(0.1), torch.tensor(0.5)


def sparsified(network: nn.Module, images: Tensor, alpha: float = 0.6) -> SparsifiedModel:
    sites = find_sites(network, images)
    statistics = [(torch.zeros(s.channels), torch.full((s.channels,), 0.1)) for s in sites]
    operators = [MeanSparse(*pair, alpha, s.channel_axis) for pair, s in zip(statistics, sites, strict=True)]
    return insert(network, sites, operators)


def gradient(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    x = images.clone().requires_grad_()
    logits = model(x)
    return logits.detach(), torch.autograd.grad(logits[:, 0].sum(), x)[0]


def soft_band(x: Tensor, edge: float) -> Tensor:
    return MEAN + (x - MEAN) * torch.sigmoid(((x - MEAN).abs() - THRESHOLD) / edge)


@pytest.mark.parametrize("edge", [0.05, 0.5])
def test_soft_keeps_values_and_has_the_derivative_of_a_soft_band(edge: float) -> None:
    x = torch.linspace(-2, 2, 4001, dtype=torch.float64).requires_grad_()
    out = mean_sparsify(x, MEAN, THRESHOLD, soft_edge=torch.tensor(edge))
    assert torch.equal(out, mean_sparsify(x, MEAN, THRESHOLD))
    slope = torch.autograd.grad(out.sum(), x)[0]
    expected = torch.autograd.grad(soft_band(x, edge).sum(), x)[0]
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-5)


def test_a_cold_band_is_the_true_one_and_a_channel_without_deviation_is_finite() -> None:
    x = torch.tensor([-2.0, 0.1, 0.2, 3.0], requires_grad=True)
    out = mean_sparsify(x, MEAN, THRESHOLD, soft_edge=torch.tensor(1e-3))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], torch.tensor([1.0, 0.0, 0.0, 1.0]))
    flat = mean_sparsify(x, MEAN, torch.tensor(0.0), soft_edge=torch.tensor(0.0))
    assert torch.isfinite(torch.autograd.grad(flat.sum(), x)[0]).all()


@pytest.mark.parametrize("rule", ["identity", "soft:0.1", "soft:2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rule_changes_gradients_and_not_values(
    network: nn.Module, images: Tensor, rule: str, dtype: torch.dtype
) -> None:
    model = sparsified(network, images).to(dtype)
    values, true_gradient = gradient(model, images.to(dtype))
    with backward_rule(model, rule):
        same, replaced = gradient(model, images.to(dtype))
        copied = gradient(copy.deepcopy(model), images.to(dtype))[1]
    assert torch.equal(same, values)
    assert replaced.dtype == dtype and torch.equal(copied, replaced)
    assert (replaced - true_gradient).norm() > 0.05 * replaced.norm() > 0
    assert torch.equal(gradient(model, images.to(dtype))[1], true_gradient)


@pytest.mark.parametrize("rule", ["true", "identity", "soft:0.3"])
def test_every_example_has_its_own_alpha_under_every_rule(network: nn.Module, images: Tensor, rule: str) -> None:
    model = sparsified(network, images)
    alphas = torch.tensor([0.0, 0.3, 0.6] * 2)
    with backward_rule(model, rule):
        with example_alphas_set(model, alphas):
            mixed = gradient(model, images)[1]
        for alpha in (0.0, 0.3, 0.6):
            with alpha_set(model, alpha):
                alone = gradient(model, images)[1]
            torch.testing.assert_close(mixed[alphas == alpha], alone[alphas == alpha], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight", [0.5, torch.tensor([0.25, 1.0, 0.0])])
def test_a_band_that_narrows_has_the_edge_of_each_examples_own_progress(weight: float | Tensor) -> None:
    operator = MeanSparse(torch.zeros(3), torch.tensor([0.5, 1.0, 2.0]), 0.6, weight=weight)
    x = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    progress = torch.tensor([0.0, 0.5, 1.0] * 2)
    with backward_rule(operator, "soft:0.4to0.1"):
        assert torch.equal(gradient(operator, x)[0], operator(x))
        with progress_set(operator, progress):
            narrowing = gradient(operator, x)[1]
        first = gradient(operator, x)[1]
    for value, width in ((0.0, 0.4), (0.5, 0.2), (1.0, 0.1)):
        with backward_rule(operator, f"soft:{width}"), progress_set(operator, progress):  # which changes no other rule
            fixed = gradient(operator, x)[1]
        torch.testing.assert_close(narrowing[progress == value], fixed[progress == value], rtol=1e-4, atol=1e-6)
    assert torch.equal(first[::3], narrowing[::3]) and not torch.equal(first[1::3], narrowing[1::3])
    assert operator.example_progress is None


def test_an_edge_a_row_is_the_same_in_the_pieces_of_a_large_input() -> None:
    x = torch.randn(40, 4, 96, 96, generator=torch.Generator().manual_seed(0))
    edge = torch.linspace(0.01, 1, 40).view(-1, 1, 1, 1) * torch.ones(1, 4, 1, 1)
    mean, threshold = torch.zeros(1, 4, 1, 1), torch.full((1, 4, 1, 1), 0.5)

    def slope(rows: slice) -> Tensor:
        part = x[rows].clone().requires_grad_()
        return torch.autograd.grad(mean_sparsify(part, mean, threshold, soft_edge=edge[rows]).sum(), part)[0]

    whole = slope(slice(None))
    for row in (0, 17, 39):
        torch.testing.assert_close(whole[row : row + 1], slope(slice(row, row + 1)), rtol=1e-5, atol=1e-6)


def test_rules_survive_compilation(images: Tensor) -> None:
    model = sparsified(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)), images)
    compiled = torch.compile(model, backend="aot_eager")
    for rule in ("true", "identity", "soft:0.1", "soft:0.1to0.01"):
        with backward_rule(model, rule), progress_set(model, torch.linspace(0, 1, len(images))):
            for ours, theirs in zip(gradient(compiled, images), gradient(model, images), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_base_gradient_has_the_models_values_and_the_base_models_jacobian(network: nn.Module, images: Tensor) -> None:
    model = sparsified(network, images)
    values, true_gradient = gradient(model, images)
    with operators_off(model):
        base_values, base_gradient = gradient(model, images)
    assert not torch.equal(values, base_values)
    counted = CountedModel(model, n_classes=10, device=images.device, base_gradient=True)
    x = images.clone().requires_grad_()
    logits = counted(x)
    assert torch.equal(logits, values)
    assert torch.equal(torch.autograd.grad(logits[:, 0].sum(), x)[0], base_gradient)
    assert (base_gradient - true_gradient).norm() > 0.05 * base_gradient.norm() > 0
    assert (counted.forward_passes, counted.backward_passes) == (12, 6)
    with torch.no_grad():
        counted(images)
    assert counted.forward_passes == 18  # where no gradient is asked for, one pass does
    assert torch.equal(model(images), values)


def test_rules_nest_and_unknown_ones_are_refused() -> None:
    model = MeanSparse(torch.zeros(2), torch.ones(2), 0.5)
    with backward_rule(model, "soft:0.5"):
        with backward_rule(model, "identity"):
            assert model.straight_through
        assert model.rule == parse_backward_rule("soft:0.5") and not model.straight_through
    assert model.rule == parse_backward_rule("true")
    for rule in (
        "soft",
        "soft:0",
        "soft:-1",
        "soft:x",
        "hard",
        "soft:inf",
        "soft:0.1to0",
        "soft:0.1to",
        "soft:3to2to1",
    ):
        with pytest.raises(ConfigError, match="backward rule"):
            parse_backward_rule(rule)


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0])
def test_the_soft_edge_is_in_stds_of_the_channel_whatever_the_weight_of_the_site(weight: float) -> None:
    # std 2, alpha 0.4: the threshold is 0.8 * weight; a soft edge of 0.05 stds is 0.1 wide
    operator = MeanSparse(torch.zeros(1), torch.full((1,), 2.0), 0.4, weight=weight)
    operator.rule = parse_backward_rule("soft:0.05")
    x = torch.full((1, 1, 1, 1), 0.5, requires_grad=True)
    operator(x).sum().backward()
    gate = 1 / (1 + math.exp(-(0.5 - 0.8 * weight) / 0.1))
    assert x.grad is not None
    assert float(x.grad) == pytest.approx(gate + 0.5 * gate * (1 - gate) / 0.1, rel=1e-5)
    assert float(operator(x.detach())) == (0.5 if weight < 0.6 else 0.0)


def test_a_checkpoint_with_a_weight_has_the_edge_of_an_operator_with_its_alpha() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3)).eval()
    x = torch.rand(4, 1, 8, 8)
    sites = tuple(find_sites(net, x))
    statistics = (ChannelStatistics(9, torch.tensor([0.1, -0.1]).double(), torch.tensor([0.5, 0.3]).double()),)
    grads = []
    for weights, alpha in (((0.5,), 0.4), (None, 0.2)):
        model = sparsify(copy.deepcopy(net), Checkpoint(sites, statistics, "pooled", alpha, site_weights=weights))
        image = x.clone().requires_grad_()
        with backward_rule(model, "soft:0.05"):
            model(image).square().sum().backward()
        grads.append(image.grad)
    torch.testing.assert_close(grads[0], grads[1])
