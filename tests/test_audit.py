"""Defences whose worth is known, each named rightly by ``audit``."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from meansparse_cli import Budget, audit
from meansparse_cli.data.examples import stack_examples
from meansparse_cli.data.splits import load_split, take_examples
from meansparse_cli.engine.comparison import Evaluation
from meansparse_cli.errors import ConfigError, MeanSparseError, SiteError
from meansparse_cli.models.source import load_model, resolve_model
from meansparse_cli.operator.defence import BAND, SOFT, Defence
from meansparse_cli.operator.function import IDENTITY

BUDGET = Budget("Linf", 0.1)
SHORT = ("apgd-margin-10", "bpda-apgd-margin-10", "bpda-apgd-ce-10")
Images = tuple[Tensor, Tensor]


class Levels(nn.Module):
    """Values rounded to so many levels of [low, high]: a gradient of zero."""

    def __init__(self, n_levels: int, low: float = 0.0, high: float = 1.0) -> None:
        super().__init__()
        self.n_steps, self.low, self.high = n_levels - 1, low, high

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.high - self.low) / self.n_steps
        return ((x.clamp(self.low, self.high) - self.low) / scale).round() * scale + self.low


class KWinners(nn.Module):
    """The largest tenth of the activations of an image stay (Xiao et al. 2020, k-WTA)."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        smallest = flat.topk(max(flat.shape[1] // 10, 1), dim=1).values[:, -1:]
        return torch.where(flat >= smallest, flat, 0.0).view_as(x)


class Resized(nn.Module):
    """Shrunk or not, by chance, and brought back (Xie et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        size = 6 + int(torch.randint(3, ()))
        small = functional.interpolate(x, size=(size, size), mode="bilinear")
        return functional.interpolate(small, size=x.shape[2:], mode="bilinear")


class Thermometer(nn.Module):
    """Each pixel as ``n`` steps (Buckman et al. 2018); ``Thermometer.soft`` is the surrogate of Athalye et al. 2018."""

    def __init__(self, n: int = 8) -> None:
        super().__init__()
        self.register_buffer("levels", torch.arange(n).view(1, -1, 1, 1) / n)

    def forward(self, x: Tensor) -> Tensor:
        return (x > self.levels).float()

    def soft(self, x: Tensor) -> Tensor:
        return ((x - self.levels) * 8).clamp(0, 1)


class Read(nn.Module):
    """The steps of a thermometer as one pixel again, so that a network of pixels can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1, keepdim=True)


class Steps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (4 * x).round() / 4


class Behind(nn.Module):
    """``front`` before ``network``."""

    def __init__(self, front: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.front, self.network = front, network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.front(x))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return load_model(resolve_model("digits"))


@pytest.fixture(scope="module")
def images() -> Images:
    return stack_examples(take_examples(load_split("digits", None, "test"), 64))


def verdict_of(model: nn.Module, images: Images, defence: Any = "front", **options: Any) -> tuple[Evaluation, str]:
    found = audit(model, *images, defence, budget=BUDGET, **{"attacks": SHORT} | options)
    return found, found.verdict.name


def fallen(found: Evaluation) -> float:
    """By how many points the worst case lies below what plain gradients show, on the defended model."""
    rows = {c.name: c for c in found.comparisons}
    return float(rows["plain attacks"].sparsified.fraction - rows["worst case"].sparsified.fraction)


@pytest.mark.parametrize("n_levels", [4, 16])
def test_masked_gradients_are_called_so(n_levels: int, network: nn.Module, images: Images) -> None:
    found, name = verdict_of(Behind(Levels(n_levels), network), images)
    assert name == "gradient masking", found.verdict
    assert fallen(found) > 0.05


def test_the_slope_of_a_step_is_found_across_the_band() -> None:
    """round(4 x) / 4 jumps by 1/4 at 0.125: within half a band of it the slope is 1/4 over the band, elsewhere 0."""
    x = torch.tensor([[[[0.0, 0.120, 0.2, 0.45]]], [[[0.12, 0.12, 0.12, 0.13]]]], requires_grad=True)
    half = BAND * x.detach().flatten(1).std(dim=1)
    defended = Defence("step", Steps(), SOFT)
    defended.rule = IDENTITY
    out = defended(x)
    assert torch.equal(out, Steps()(x))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    expected = torch.zeros(2, 4)
    expected[0, 1] = 0.25 / (2 * half[0])  # half a band: 0.0095 here, 0.00025 in the second example
    torch.testing.assert_close(gradient.flatten(1), expected)


def test_the_slope_of_a_quantiser_shows_its_masking(network: nn.Module, images: Images) -> None:
    found, name = verdict_of(Behind(Levels(16), network), images, {"front": SOFT})
    assert name == "gradient masking" and fallen(found) > 0.05, found.verdict


def test_k_winners_fall_to_nothing(network: nn.Module, images: Images) -> None:
    longer = tuple(name.replace("10", "30") for name in SHORT)
    found, name = verdict_of(Behind(KWinners(), network), images, attacks=longer)
    assert name == "worse", found.verdict
    assert fallen(found) > 0.02 and found.comparisons[-1].sparsified.fraction < 0.02


def test_a_quantiser_of_activations(network: nn.Module, images: Images) -> None:
    model = copy.deepcopy(network)
    model.layer4.append(Levels(16, -4.0, 4.0))  # type: ignore[operator, union-attr]
    few = images[0][:48], images[1][:48]
    found, name = verdict_of(model, few, "layer4.2", attacks=["fast"])
    assert name == "gradient masking", found.verdict


def test_a_thermometer_takes_a_surrogate_and_a_base(network: nn.Module, images: Images) -> None:
    code = Thermometer()
    model = Behind(nn.Sequential(code, Read()), network)
    with pytest.raises(SiteError, match="its input"):
        verdict_of(model, images, "front.0", base=network)
    found, name = verdict_of(model, images, {"front.0": code.soft}, base=network)
    assert name == "gradient masking", found.verdict


def test_a_random_defence_says_how_many_draws(network: nn.Module, images: Images) -> None:
    model = Behind(Resized(), network)
    with pytest.raises(ConfigError, match="random") as raised:
        verdict_of(model, images)
    assert raised.value.hint is not None and "n_draws" in raised.value.hint
    few = images[0][:24], images[1][:24]
    found, name = verdict_of(model, few, n_draws=4, attacks=SHORT[:2])
    assert name in ("worse", "no difference", "inconclusive"), found.verdict


def test_nothing_is_found_where_nothing_is(network: nn.Module, images: Images) -> None:
    same = images[0][:48].repeat(2, 1, 1, 1), images[1][:48].repeat(2)  # 96 examples show that a difference is none
    found, name = verdict_of(Behind(nn.Identity(), network), same)
    assert name == "no difference", found.verdict
    assert found.comparisons[-1].gain.gained == found.comparisons[-1].gain.lost == 0


def test_a_true_gain_is_called_real(network: nn.Module, images: Images) -> None:
    weak = load_model(resolve_model("digits"))
    with torch.no_grad():
        for parameter in weak.parameters():
            parameter += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=torch.manual_seed(1))
    found, name = verdict_of(network, images, "", base=weak)
    assert name == "real gain", found.verdict


def test_neither_model_is_changed(network: nn.Module, images: Images) -> None:
    model = Behind(Levels(4), network)
    names, x = [name for name, _ in model.named_modules()], images[0][:4]
    before = model(x)
    verdict_of(model, (images[0][:8], images[1][:8]), attacks=["pgd-3"])
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(model(x), before)


WRONG: dict[str, tuple[Any, str]] = {
    "nothing": ("frnt", "matches no module.*|front"),
    "a parameter": ("network.conv1.weight", "a tensor, not a module"),
    "one inside another": ({"network": None, "network.conv1": None}, "inside another"),
    "no defence": ("", "no defence was named"),
    "another shape": ({"front": lambda x: x[:, :, :4]}, "surrogate"),
    "a module whose place identity cannot take": ("network", "for 4 images"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_cannot_be_audited_is_refused_in_words(kind: str, network: nn.Module, images: Images) -> None:
    defence, says = WRONG[kind]
    with pytest.raises(MeanSparseError, match=says):
        verdict_of(Behind(Levels(4), network), (images[0][:4], images[1][:4]), defence)


def test_a_defence_that_changes_the_batch_is_refused(network: nn.Module, images: Images) -> None:
    class Half(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[: len(x) // 2]

    with pytest.raises(SiteError, match="of a batch of shape"):
        verdict_of(Behind(Half(), network), (images[0][:4], images[1][:4]))


@pytest.mark.parametrize("n", [1, 3])
def test_two_classes_and_one_example(n: int) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.levels: Callable[[Tensor], Tensor] = Levels(3)

        def forward(self, x: Tensor) -> Tensor:
            value = self.levels(x).mean((1, 2, 3)) - 0.5
            return torch.stack([-value, value], dim=1) * 5

    x = torch.full((n, 1, 4, 4), 0.7)
    found = audit(Two(), x, torch.ones(n, dtype=torch.long), "levels", budget=Budget("L2", 1.0))
    assert len(found.labels) == n
