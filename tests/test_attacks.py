"""Every attack against models whose answer is known, and what ``run_attack`` promises whatever the attack does."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from meansparse_cli.attacks import ATTACKS, PRESETS, expand_attacks, find_attack
from meansparse_cli.attacks import fab as fab_module
from meansparse_cli.attacks import runner as runner_module
from meansparse_cli.attacks import square as square_module
from meansparse_cli.attacks.budget import enforce_budget, unit_l2
from meansparse_cli.attacks.pgd import PGDRule
from meansparse_cli.attacks.problem import AttackResult, Budget, Problem
from meansparse_cli.attacks.queue import AttackTask, Rule, SearchOutcome
from meansparse_cli.attacks.runner import run_attack
from meansparse_cli.data.examples import Examples
from meansparse_cli.errors import AttackError, ConfigError, DataError

SHAPE = (3, 6, 6)
SHORT_ATTACKS = [
    "apgd-margin-30",
    "apgd-probability-40",
    "apgd-margin-t3-30",
    "apgd-probability-t3-30",
    "apgd-margin-near3-30",
]
COSINE_ATTACKS = ["cosine-margin-2x80", "cosine-probability-2x80"]
GRADIENT_ATTACKS = ["pgd-50", "adaptive-1-1", "apgd-ce", "apgd-dlr", "apgd-t", *SHORT_ATTACKS, *COSINE_ATTACKS]
NEAREST_BROKEN = {"pgd-50": 0.6, "adaptive-1-1": 0.6, "apgd-ce": 0.6, "apgd-dlr": 0.9, "apgd-t": 0.99}
NEAREST_BROKEN |= dict.fromkeys([*SHORT_ATTACKS, *COSINE_ATTACKS], 0.9)
BUDGETS = [Budget("Linf", 8 / 255), Budget("L2", 0.25)]
ONE_OF_EACH = [  # search families and backward rules
    *("pgd-50", "adaptive-2-2", "apgd-ce", "apgd-t", "fab-t", "square"),
    *("bpda-apgd-ce", "soft-0.2-apgd-ce", "base-gradient-apgd-dlr"),
    *("soft-0.05to0.005-apgd-margin-30", "bpda-apgd-probability-40", "apgd-margin-t3-30", "apgd-probability-near3-30"),
    *COSINE_ATTACKS,
]
budgets = pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.norm)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer queries and steps for the slow attacks; one thread, so that sums do not depend on the machine."""
    torch.set_num_threads(1)
    monkeypatch.setattr(square_module, "N_QUERIES", 60)
    monkeypatch.setattr(fab_module, "N_STEPS", 10)


class Linear(nn.Module):
    """Logits w x + b, computed in float64 so that they do not depend on the batch."""

    def __init__(self, n_classes: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        n_pixels = SHAPE[0] * SHAPE[1] * SHAPE[2]
        self.weight = nn.Parameter(torch.randn(n_classes, n_pixels, generator=generator))
        self.n_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        return ((x.flatten(1) - 0.5).double() @ self.weight.double().T).float()

    def distance(self, x: Tensor, y: Tensor, norm: str) -> Tensor:
        """(n,): how far the nearest other class is, in closed form (while no pixel is clipped)."""
        logits = self(x)
        rise = self.weight[None] - self.weight[y][:, None]  # (n, n_classes, n_pixels)
        length = rise.abs().sum(-1) if norm == "Linf" else rise.norm(dim=-1)
        gap = logits.gather(1, y[:, None]) - logits
        return (gap / length).scatter(1, y[:, None], torch.inf).amin(dim=1).detach()


def images(n: int, spread: float = 0.1, seed: int = 1) -> Tensor:
    """Images around grey, far enough from black and white for no budget here to be clipped."""
    return 0.5 + spread * (torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(seed)) - 0.5)


def attack(
    name: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    budget: Budget,
    *,
    n_classes: int,
    batch_size: int = 8,
    seed: int = 0,
) -> AttackResult:
    problem = Problem(model, budget, n_classes, seed, batch_size)
    return run_attack(name, problem, Examples(x, y, torch.arange(len(x))))


def at_distances(model: Linear, factors: list[float], budget: Budget) -> tuple[Tensor, Tensor]:
    """Images whose nearest other class is ``factor * eps`` away: grey, where all logits are 0, plus some of a class."""
    n_classes = len(model.weight)
    weight = model.weight.detach() - model.weight.detach().mean(dim=0)
    x = images(len(factors)) + 0.2 * weight[torch.arange(len(factors)) % n_classes].sign().view(-1, *SHAPE)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    scale = torch.tensor(factors) * budget.eps / model.distance(x, y, budget.norm)
    x = 0.5 + (x - 0.5) * scale.view(-1, 1, 1, 1)
    assert (x - 0.5).abs().max() < 0.5 - budget.eps, "a clipped pixel would change the closed form"
    return x, y


@budgets
@pytest.mark.parametrize("n_classes", [2, 3, 4, 8])
@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_linear_model_is_broken_exactly_where_theory_says(name: str, n_classes: int, budget: Budget) -> None:
    model = Linear(n_classes)
    # Beyond 2 classes an untargeted loss climbs towards several at once, cross-entropy more so than DLR.
    near = NEAREST_BROKEN[name] if n_classes > 2 else 0.98 if name in ("pgd-50", "adaptive-1-1") else 0.995
    x, y = at_distances(model, [near, 1.005, near / 2, 1.1, 0.1, 2.0], budget)
    result = attack(name, model, x, y, budget, n_classes=n_classes)
    assert result.broken.tolist() == [True, False, True, False, True, False]
    assert not result.rejected.any()


@budgets
@pytest.mark.parametrize("n_classes", [2, 4, 10])
def test_one_target_is_enough_where_it_is_the_nearest_class(n_classes: int, budget: Budget) -> None:
    model = Linear(n_classes)
    x, y = at_distances(model, [0.995, 1.005] * 10, budget)
    nearest = attack("apgd-margin-near1-30", model, x, y, budget, n_classes=n_classes, batch_size=7)
    assert nearest.broken.tolist() == [True, False] * 10
    likeliest = attack("apgd-margin-t1-30", model, x, y, budget, n_classes=n_classes)
    more = nearest.passes[1::2] - likeliest.passes[1::2]
    assert more.tolist() == [[1, n_classes - 1]] * 10, "a forward pass, and a backward pass a class"
    assert (int(likeliest.broken.sum()) < 10) == (n_classes > 2), "the likeliest class is not always the nearest"


@budgets
@pytest.mark.parametrize("name", ["fab-t", "square"])
@pytest.mark.parametrize("n_classes", range(2, 13))
def test_fab_and_square_on_a_linear_model(name: str, n_classes: int, budget: Budget) -> None:
    model = Linear(n_classes)
    near = 0.98 if name == "fab-t" else 0.1  # few queries
    x, y = at_distances(model, [near, 1.005, 1.1, near / 2], budget)
    result = attack(name, model, x, y, budget, n_classes=n_classes, batch_size=3)
    assert result.broken.tolist() == [True, False, False, True]


@budgets
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_budget_range_and_verdict_hold(name: str, budget: Budget) -> None:
    model = Linear(4)
    x = torch.rand(9, *SHAPE, generator=torch.Generator().manual_seed(2)).round(decimals=1)  # some pixels at 0 and 1
    y = model(x).argmax(dim=1)
    y[0] = (y[0] + 1) % 4
    result = attack(name, model, x, y, Budget(budget.norm, 4 * budget.eps), n_classes=4)
    delta = result.adversarial.double() - x.double()
    size = delta.flatten(1).abs().amax(dim=1) if budget.norm == "Linf" else delta.flatten(1).norm(dim=1)
    assert (size <= 4 * budget.eps).all()
    assert result.adversarial.min() >= 0 and result.adversarial.max() <= 1
    assert result.adversarial.dtype == torch.float32
    assert torch.equal(model(result.adversarial).argmax(dim=1) != y, result.broken)
    assert torch.equal(result.adversarial[~result.broken], x[~result.broken])
    assert result.broken[0] and torch.equal(result.adversarial[0], x[0])
    assert result.broken.sum() > 1
    assert not result.rejected.any()


@pytest.mark.parametrize("name", [*GRADIENT_ATTACKS, "fab-t", "square", "base-gradient-apgd-ce"])
def test_same_seed_same_result_for_every_batch_size_and_order(name: str) -> None:
    model, budget = Linear(4), BUDGETS[0]
    x, y = at_distances(model, [0.5, 0.9, 1.1, 2.0, 0.95, 1.5, 0.3, 0.8], budget)
    indices = torch.arange(50, 58)

    def run(rows: Tensor, batch_size: int, seed: int = 0) -> AttackResult:
        examples = Examples(x[rows], y[rows], indices[rows])
        return run_attack(name, Problem(model, budget, 4, seed, batch_size), examples)

    reference = run(torch.arange(8), 8)
    assert torch.equal(run(torch.arange(8), 8).adversarial, reference.adversarial)
    for batch_size, rows in (
        (1, torch.arange(8)),
        (3, torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])),
        (8, torch.tensor([4, 1])),
    ):
        result = run(rows, batch_size)
        assert torch.equal(result.broken, reference.broken[rows])
        assert torch.equal(result.adversarial, reference.adversarial[rows])
    # on a linear model the sign of a margin's gradient is the same everywhere: one step arrives in the same corner
    if name not in ("fab-t", "apgd-margin-t3-30", "apgd-margin-near3-30"):
        assert not torch.equal(run(torch.arange(8), 8, seed=1).adversarial, reference.adversarial)


def test_a_band_narrows_with_the_steps_of_each_example_alone() -> None:
    model, budget = BandedNet(threshold=4.0), BUDGETS[0]
    x = 0.5 + torch.linspace(-0.02, 0.02, 7).view(-1, 1, 1, 1) * torch.ones(7, *SHAPE)
    examples = Examples(x, torch.zeros(7, dtype=torch.int64), torch.arange(7))
    name, edges = "soft-0.5to0.05-apgd-margin-t3-30", list[Tensor]()
    results = [run_attack(name, Problem(model, budget, 4, 0, batch_size), examples) for batch_size in (1, 3, 7)]
    assert results[0].broken.any() and not results[0].broken.all()
    for other in results[1:]:
        assert torch.equal(other.adversarial, results[0].adversarial)
        assert torch.equal(other.passes, results[0].passes)
    model.mean_sparse.register_forward_hook(
        lambda operator, *_: None if operator.example_progress is None else edges.append(operator.example_progress)
    )
    run_attack(name, Problem(model, budget, 4, 0, 7), examples.at(~results[0].broken))
    seen = torch.stack([edge[0] for edge in edges]).view(3, 31)
    torch.testing.assert_close(seen, (torch.arange(31) / 30).expand(3, 31))


@pytest.mark.parametrize("name", ["apgd-t", "square"])
def test_where_memory_ends_it_goes_on_with_half_the_batch_and_the_same_result(name: str) -> None:
    class Small(Linear):
        n_refused, fits = 0, 8

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > self.fits:
                self.n_refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(x)

    model, budget, told = Small(4), BUDGETS[0], list[int]()
    x, y = at_distances(model, [0.5, 0.9, 1.1, 2.0, 0.95, 1.5, 0.3, 0.8], budget)
    examples = Examples(x, y, torch.arange(8))
    whole = run_attack(name, Problem(model, budget, 4, 0, 8), examples)
    model.fits = 3
    for _ in range(2):
        result = run_attack(name, Problem(model, budget, 4, 0, 8), examples, on_progress=told.append)
        assert torch.equal(result.adversarial, whole.adversarial) and torch.equal(result.passes, whole.passes)
        assert sum(told) == 8
        told.clear()
    assert model.n_refused == 2, "8 and 4 were too many, once"
    model.fits = 0
    with pytest.raises(torch.OutOfMemoryError):
        run_attack(name, Problem(model, budget, 4, 0, 8), examples)


@pytest.mark.parametrize("name", [*GRADIENT_ATTACKS, "fab-t", "square"])
def test_few_classes_and_single_example(name: str) -> None:
    for n_classes in range(2, 13):
        model = Linear(n_classes)
        x, y = at_distances(model, [0.1], BUDGETS[0])
        assert attack(name, model, x, y, BUDGETS[0], n_classes=n_classes).broken.all()


def test_counts_of_a_known_case() -> None:
    model, budget = Linear(2), BUDGETS[0]
    x, y = at_distances(model, [2.0, 2.0, 3.0, 4.0], budget)
    result = attack("apgd-ce", model, x, y, budget, n_classes=2, batch_size=4)
    assert not result.broken.any()
    assert result.forward_passes == 4 + 4 * 101  # the clean pass; the start and 100 steps
    assert result.backward_passes == 4 * 100  # none is needed at the last point
    result = attack("pgd-50", model, x, y, budget, n_classes=2, batch_size=4)
    assert (result.forward_passes, result.backward_passes) == (4 + 4 * 51, 4 * 50)
    wrong = attack("apgd-ce", model, x, 1 - y, budget, n_classes=2, batch_size=3)
    assert wrong.broken.all() and (wrong.forward_passes, wrong.backward_passes) == (4, 0)
    assert torch.equal(wrong.adversarial, x)
    easy, y = at_distances(model, [0.8], budget)
    result = attack("apgd-ce", model, easy, y, budget, n_classes=2, batch_size=1)
    n_steps = result.backward_passes
    assert result.broken.all() and 1 <= n_steps < 5
    assert result.forward_passes == 1 + (n_steps + 1) + 1  # clean, search, judge


def test_square_counts_its_queries() -> None:
    model, budget = Linear(4), BUDGETS[0]
    x, y = at_distances(model, [5.0, 5.0], budget)
    result = attack("square", model, x, y, budget, n_classes=4)
    # clean, start, queries; fewer where a proposal is the image itself
    assert 2 * (1 + 1 + 50) < result.forward_passes <= 2 * (1 + 1 + 60)
    assert result.backward_passes == 0


@pytest.mark.parametrize("claim", ["clean", "outside", "nan"])
def test_a_break_that_is_none_is_rejected(claim: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, budget = Linear(4), BUDGETS[0]
    x, y = at_distances(model, [2.0, 2.0], budget)

    def liar(task: AttackTask, rule: Rule) -> SearchOutcome:
        x = task.examples.x
        points = {"clean": x, "outside": 1 - x, "nan": x * torch.nan}[claim]
        passes = torch.zeros(len(x), 2, dtype=torch.int64)
        return SearchOutcome(points, torch.tensor([True, False])[: len(points)], passes)

    monkeypatch.setattr(runner_module, "search", liar)
    result = attack("apgd-ce", model, x, y, budget, n_classes=4)
    assert not result.broken.any()
    assert int(result.rejected.sum()) == 2  # the one example, and again when it is searched in full precision
    assert torch.equal(result.adversarial, x)


class UnsureInLowPrecision(Linear):
    """Takes every image for class 1 under autocast; a linear model otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits.roll(1, dims=1) if torch.is_autocast_enabled("cpu") else logits


@pytest.mark.parametrize("name", ["apgd-ce", "fab-t", "square"])
def test_a_break_of_low_precision_does_not_end_the_search(name: str) -> None:
    model, budget = UnsureInLowPrecision(4), BUDGETS[0]
    x, y = at_distances(model, [0.1, 2.0], budget)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        result = attack(name, model, x, y, budget, n_classes=4)
    assert result.broken.tolist() == [True, False]
    assert int(result.rejected.sum()) == 2


class BandedNet(nn.Module):
    """One feature, the sum of the pixels' distances to grey; MeanSparse flattens it where every start lies."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        from meansparse_cli.operator.module import MeanSparse

        self.mean_sparse = MeanSparse(torch.zeros(1), torch.ones(1), alpha=threshold, channel_axis=1)
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        feature = self.mean_sparse((x - 0.5).flatten(1).sum(dim=1, keepdim=True))
        evidence = feature - 0.5 * self.threshold
        return torch.cat([torch.zeros_like(evidence), evidence, evidence - 1, evidence - 2], dim=1)


@budgets
def test_bpda_breaks_what_plain_gradients_cannot(budget: Budget) -> None:
    n_pixels = images(1).numel()
    farthest = budget.eps * (n_pixels if budget.norm == "Linf" else n_pixels**0.5)
    model = BandedNet(threshold=0.7 * farthest)
    x, y = torch.full((3, *SHAPE), 0.5), torch.zeros(3, dtype=torch.int64)
    for name in [*GRADIENT_ATTACKS, "fab-t"]:
        assert not attack(name, model, x, y, budget, n_classes=4).broken.any(), name
    for name in ("bpda-apgd-ce", "bpda-apgd-dlr", "bpda-apgd-t", "base-gradient-apgd-dlr", "soft-0.5-apgd-ce"):
        result = attack(name, model, x, y, budget, n_classes=4)
        assert result.broken.all(), name
        assert not model.mean_sparse.straight_through


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bpda_is_no_different_without_mean_sparse(name: str) -> None:
    model, budget = Linear(4), BUDGETS[1]
    x, y = at_distances(model, [0.05, 3.0], budget)
    assert attack(name, model, x, y, budget, n_classes=4).broken.tolist() == [True, False]


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(144, 4),
            nn.Dropout(0.5),
        ).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(memory_format=torch.channels_last))


@budgets
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_channels_last_and_no_trace_left(name: str, budget: Budget) -> None:
    model = ChannelsLast().train()
    model.net[4].bias.requires_grad_(False)
    x = torch.rand(4, *SHAPE, generator=torch.Generator().manual_seed(4)).to(memory_format=torch.channels_last)
    with torch.no_grad():
        y = model.eval()(x).argmax(dim=1)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    result = attack(name, model, x, y, budget, n_classes=4, batch_size=2)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, True, True, False]
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model.eval()(result.adversarial).argmax(dim=1) != y, result.broken)


@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_progress_adds_up(name: str) -> None:
    model = Linear(4)
    x, y = at_distances(model, [0.5, 2.0, 0.1, 1.5, 2.0], BUDGETS[0])
    y[4] = (y[4] + 1) % 4
    told: list[int] = []
    problem = Problem(model, BUDGETS[0], n_classes=4, seed=0, batch_size=2)
    run_attack(name, problem, Examples(x, y, torch.arange(5)), on_progress=told.append)
    assert sum(told) == 5 and min(told) > 0


class Returns(nn.Module):
    def __init__(self, make: object) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> object:
        return self.make(x)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda x: x.new_zeros(len(x), 5), r"shape \(2, 5\)"),
        (lambda x: x.new_zeros(len(x)), r"shape \(2,\)"),
        (lambda x: torch.zeros(len(x), 4, dtype=torch.int64), "int64"),
        (lambda x: (x.new_zeros(len(x), 4), None), "tuple"),
        (lambda x: x.new_full((len(x), 4), torch.nan), "NaN or infinite for 2 of 2"),
        (lambda x: x.new_full((len(x), 4), torch.inf), "NaN or infinite"),
    ],
)
def test_unusable_outputs_are_named(make: object, found: str) -> None:
    with pytest.raises(AttackError, match=found):
        attack("apgd-ce", Returns(make), images(2), torch.zeros(2, dtype=torch.int64), BUDGETS[0], n_classes=4)


@pytest.mark.parametrize("name", ["apgd-ce", "pgd-50", "fab-t"])
def test_a_model_without_gradient_is_named(name: str) -> None:
    x, y = at_distances(Linear(4), [0.1], BUDGETS[0])
    detached = Returns(lambda x: Linear(4)(x).detach())
    with pytest.raises(AttackError, match="no gradient"):
        attack(name, detached, x, y, BUDGETS[0], n_classes=4)
    assert attack("square", detached, x, y, BUDGETS[0], n_classes=4).broken.all()


def test_unusable_arguments_are_named() -> None:
    model, x, y = Linear(4), images(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ConfigError, match="eps = 8"):
        attack("apgd-ce", model, x, y, Budget("Linf", 8.0), n_classes=4)
    with pytest.raises(ConfigError, match="norm"):
        attack("apgd-ce", model, x, y, Budget("L1", 1.0), n_classes=4)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="255"):
        attack("apgd-ce", model, 255 * x.round(), y, BUDGETS[0], n_classes=4)
    with pytest.raises(DataError, match="labels"):
        attack("apgd-ce", model, x, y + 4, BUDGETS[0], n_classes=4)
    with pytest.raises(DataError, match="float64"):
        attack("apgd-ce", model, x.double(), y, BUDGETS[0], n_classes=4)
    with pytest.raises(AttackError, match="5 x 5"):
        attack("square", Returns(lambda x: x[:, :2, 0, 0]), x[:, :, :4, :4], y * 0, BUDGETS[1], n_classes=2)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_no_examples_and_no_budget(name: str) -> None:
    model = Linear(4)
    empty = attack(name, model, images(0), torch.zeros(0, dtype=torch.int64), BUDGETS[0], n_classes=4)
    assert empty.broken.shape == (0,) and empty.adversarial.shape == (0, *SHAPE)
    x = images(2)
    still = attack(name, model, x, model(x).argmax(dim=1), Budget("Linf", 0.0), n_classes=4)
    assert not still.broken.any() and torch.equal(still.adversarial, x)


@budgets
def test_enforce_budget_is_exact_and_does_next_to_nothing(budget: Budget) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(50, *SHAPE, generator=generator)
    noise = torch.randn(x.shape, generator=generator)
    if budget.norm == "Linf":
        points = (x + budget.eps * noise.sign()).clamp(0, 1)
    else:
        points = (x + budget.eps * noise / noise.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1)
    inside = enforce_budget(points, x, budget)
    delta = (inside.double() - x.double()).flatten(1)
    size = delta.abs().amax(dim=1) if budget.norm == "Linf" else delta.norm(dim=1)
    assert (size <= budget.eps).all()
    assert (inside - points).abs().max() <= 2**-22
    assert torch.equal(enforce_budget(inside, x, budget), inside)


def test_expand_attacks() -> None:
    assert expand_attacks(["square", "apgd", "apgd-ce"]) == ["apgd-ce", "apgd-dlr", "square"]
    assert expand_attacks(["standard"]) == expand_attacks(["autoattack"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert expand_attacks(["full"]) == list(ATTACKS)
    costs = [spec.cost for spec in ATTACKS.values()]
    assert costs == sorted(costs)
    assert all(find_attack(name).name == name for names in PRESETS.values() for name in names)
    known = [*ATTACKS, *ONE_OF_EACH, "apgd-probability-40", "apgd-margin-30"]
    assert {find_attack(name).search for name in known} == set(runner_module.SEARCHES)
    assert expand_attacks(["fast"]) == list(PRESETS["fast"])  # in its own order
    assert expand_attacks(["apgd", "fast"]) == [*PRESETS["fast"], "apgd-ce", "apgd-dlr"]
    assert {find_attack(name).search for name in ONE_OF_EACH} >= set(runner_module.SEARCHES) - {"apgd-dlr"}
    assert {ATTACKS[name].backward for name in PRESETS["bpda"]} == {"identity", "soft:0.05"}


def test_a_band_next_to_the_operators_own_step_is_no_bpda() -> None:
    assert all(ATTACKS[name].is_bpda for name in PRESETS["backward"])
    assert not any(ATTACKS[name].is_bpda for name in PRESETS["paper"])
    assert find_attack("soft-0.01-apgd-ce").is_bpda
    assert not find_attack("soft-0.009-apgd-ce").is_bpda
    assert not find_attack("soft-1e-6-apgd-ce").is_bpda


def test_names_with_numbers() -> None:
    assert find_attack("pgd-20").options == (("n_steps", 20),)
    assert find_attack("pgd-50") is ATTACKS["pgd-50"]
    targeted = find_attack("soft-0.05-apgd-margin-t3-30")
    assert (targeted.search, targeted.backward, targeted.cost) == ("apgd-margin-t", "soft:0.05", 271)
    assert targeted.start == find_attack("apgd-margin-t3-30").start  # equal on the base model
    assert find_attack("bpda-apgd-dlr-t4-40").search == "apgd-t"
    nearest = find_attack("soft-0.05-apgd-margin-near3-30")
    assert (nearest.search, nearest.backward, nearest.cost) == ("apgd-margin-t", "soft:0.05", 271 + 19)
    assert find_attack("base-gradient-cosine-margin-6x80").backward == "base"
    assert find_attack("adaptive-1-2:0.5").options == (("p", 1), ("q", 2), ("weight", 0.5))
    assert find_attack("adaptive-2-2").options == (("p", 2), ("q", 2))
    assert find_attack("soft-0.3-apgd-t").backward == "soft:0.3"
    narrowing = find_attack("soft-0.05to5e-3-apgd-margin-near2-40")
    assert (narrowing.backward, narrowing.start, narrowing.is_bpda) == ("soft:0.05to5e-3", "apgd-margin-near2-40", True)
    assert "edge is 0.05 to 5e-3 std soft" in narrowing.description
    assert find_attack("base-gradient-apgd-t").backward == "base"
    assert expand_attacks(["pgd-20", "apgd-ce", "soft-1-apgd-ce"]) == ["pgd-20", "apgd-ce", "soft-1-apgd-ce"]
    for name in (
        "pgd-0",
        "pgd-",
        "adaptive-0-1",
        "adaptive-1-1:x",
        "soft-0-apgd-ce",
        "soft-0.1to0-apgd-ce",
        "soft-0.1-fab-t",
    ):
        with pytest.raises(ConfigError):
            find_attack(name)


def test_fixed_steps_are_the_papers_at_50_and_2_255_elsewhere() -> None:
    model, budget = Linear(2), Budget("Linf", 0.5)
    x, y = at_distances(model, [0.9], Budget("Linf", 0.2))
    for name, n_steps in (("pgd-3", 3), ("pgd-7", 7)):
        assert attack(name, model, x, y, Budget("Linf", 1e-3), n_classes=2).backward_passes == n_steps
    problem, in_l2 = (Problem(model, within, 2, seed=0, batch_size=1) for within in (budget, BUDGETS[1]))
    assert PGDRule(problem, n_steps=50, step_size=None).step_size == 0.0078
    assert PGDRule(problem, n_steps=20, step_size=None).step_size == 2 / 255
    assert PGDRule(in_l2, n_steps=20, step_size=None).step_size == 2.5 * 0.25 / 20


def test_unknown_attack_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*apgd-ce") as error:
        expand_attacks(["apgdce"])
    assert "square" in str(error.value) and "standard" in str(error.value)
    with pytest.raises(ConfigError, match="no attack"):
        expand_attacks([])
    with pytest.raises(ConfigError, match="unknown attack"):
        attack("standard", Linear(4), images(1), torch.zeros(1, dtype=torch.int64), BUDGETS[0], n_classes=4)


def test_the_catalogue_does_not_import_torch() -> None:
    code = "import sys, meansparse_cli.attacks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class PartlyBlind(Linear):
    """A linear model whose gradient is NaN for an image with a pixel above 0.9."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            is_bright = (x.flatten(1).amax(dim=1) > 0.9).view(-1, 1, 1, 1)
            x = x.clone()
            x.register_hook(lambda grad: torch.where(is_bright, torch.nan, grad))
        return super().forward(x)


@pytest.mark.parametrize("name", ["apgd-ce", "pgd-50", "fab-t"])
@budgets
def test_a_gradient_that_is_nan_does_not_end_the_attack_on_the_others(name: str, budget: Budget) -> None:
    model = PartlyBlind(3)
    x, y = at_distances(model, [0.5, 0.5, 0.5, 0.5], budget)
    x[1, 0, 0, 1] = 0.95
    y = model(x).argmax(1)
    result = attack(name, model, x, y, budget, n_classes=3)
    assert result.broken[[0, 2, 3]].all()
    assert torch.isfinite(result.adversarial).all()


def test_a_gradient_whose_squares_underflow_still_has_a_direction() -> None:
    faint = torch.full((2, 1, 2, 2), 1e-26)
    faint[1] = 0
    assert torch.allclose(unit_l2(faint)[0], torch.full((1, 2, 2), 0.5)) and not unit_l2(faint)[1].any()


def test_transfer_is_always_part_and_never_alone() -> None:
    assert expand_attacks(["transfer", "square"]) == ["square"]
    with pytest.raises(ConfigError, match="images that other attacks found"):
        expand_attacks(["transfer"])
