"""The operator against its definition, to the bit: layouts, precisions, a threshold a row, in pieces and whole."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meansparse_cli.operator import function
from meansparse_cli.operator.function import mean_sparsify

RULES = ("true", "identity", "soft")


def defined(x: Tensor, mean: Tensor, threshold: Tensor) -> Tensor:
    """The paper's equation, as it stands."""
    mean = mean.to(x.dtype)
    return torch.where((x - mean).abs() <= threshold, mean.expand_as(x), x)


def inputs(layout: str, dtype: torch.dtype, per_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Activations with values on the very edge of the band, the mean, and the threshold, below zero for one row."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, 5, 4, 6, generator=generator)
    mean, std = torch.linspace(-1, 1, 5).view(1, 5, 1, 1), torch.linspace(0, 1, 5).view(1, 5, 1, 1)
    threshold = torch.tensor([-1.0, 0, 0.1, 0.2, 0.3, 0.5, 1]).view(7, 1, 1, 1) * std if per_row else 0.4 * std
    x[:, :, 0] = mean[:, :, 0] + threshold[:, :, 0]
    x[:, :, 1] = mean[:, :, 0]
    if layout == "channels-last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "tokens":
        x, mean, threshold = (t.flatten(2).transpose(1, 2) for t in (x, mean, threshold))
    elif layout == "flat":
        x, mean, threshold = (t[:, :, 0, 0] for t in (x, mean, threshold))
    return x.to(dtype), mean, threshold


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["channels-first", "channels-last", "tokens", "flat"])
def test_values_and_gradients_are_those_of_the_definition(
    layout: str, dtype: torch.dtype, per_row: bool, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, mean, threshold = inputs(layout, dtype, per_row)
    edge = torch.full_like(mean, 0.2)
    options = {"true": {}, "identity": {"straight_through": True}, "soft": {"soft_edge": edge}}[rule]
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    expected = defined(x, mean, threshold)
    found = []
    for in_cache in (1 << 18, 16):  # whole, and in pieces of a row or two
        monkeypatch.setattr(function, "IN_CACHE", in_cache)
        asked = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out = mean_sparsify(asked, mean, threshold, **options)  # type: ignore[arg-type]
        assert torch.equal(out, expected) and out.stride() == torch.empty_like(x).stride()
        assert torch.equal(mean_sparsify(x, mean, threshold, **options), expected)  # type: ignore[arg-type]
        found.append(torch.autograd.grad(out, asked, grad)[0])
    if rule == "soft":  # PyTorch's vectorised exp and that of the last few values differ in the last digit
        torch.testing.assert_close(*found)
    else:
        assert torch.equal(*found)
    if rule == "true":
        inside = (x - mean.to(dtype)).abs() <= threshold
        assert torch.equal(found[0], grad.masked_fill(inside, 0))
    elif rule == "identity":
        assert torch.equal(found[0], grad)
    else:
        band = function.Band(mean.to(dtype), threshold, edge)
        torch.testing.assert_close(found[0], grad * function._soft_slope(x, band))


@pytest.mark.parametrize(("rule", "bytes_a_value"), [("true", 1), ("identity", 0), ("soft", 4)])
def test_what_is_kept_for_the_backward_pass(rule: str, bytes_a_value: int) -> None:
    x, mean, threshold = inputs("channels-first", torch.float32, per_row=True)
    kept = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    edge = torch.full_like(mean, 0.2) if rule == "soft" else None
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mean_sparsify(x.requires_grad_(), mean, threshold, straight_through=rule == "identity", soft_edge=edge)
    assert sum(kept) == bytes_a_value * x.numel()


def test_an_empty_batch_and_values_that_are_not_finite() -> None:
    x, mean, threshold = inputs("channels-first", torch.float32, per_row=False)
    assert mean_sparsify(x[:0].requires_grad_(), mean, threshold).shape == (0, *x.shape[1:])
    x = x.detach()
    x[0, 0, 0, 0], x[0, 1, 0, 0] = float("nan"), float("inf")
    out = mean_sparsify(x.requires_grad_(), mean, threshold)
    assert out[0, 0, 0, 0].isnan() and not torch.isfinite(out[0, 1, 0, 0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f))])
def test_function_transforms_pass_through(transform: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    x, mean, threshold = inputs("flat", torch.float32, per_row=False)
    mean, threshold = mean[0], threshold[0]
    gradient = transform(lambda row: mean_sparsify(row, mean, threshold).square().sum())(x)
    expected = torch.where((x - mean).abs() <= threshold, 0.0, 2 * x)
    assert torch.equal(gradient, expected)


def test_a_second_derivative_is_that_of_the_definition() -> None:
    x, mean, threshold = inputs("flat", torch.float32, per_row=False)
    x.requires_grad_()
    (first,) = torch.autograd.grad(mean_sparsify(x, mean, threshold).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, torch.where((x - mean).abs() <= threshold, 0.0, 6 * x.detach()))
