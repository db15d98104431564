"""The paper's adaptive attack: its loss by hand, and PGD where nothing is masked."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meansparse_cli.attacks import runner
from meansparse_cli.attacks.adaptive import AdaptiveRule
from meansparse_cli.attacks.judge import CountedModel
from meansparse_cli.attacks.pgd import PGDRule
from meansparse_cli.attacks.problem import Budget, Problem
from meansparse_cli.attacks.queue import AttackTask, search
from meansparse_cli.attacks.runner import run_attack
from meansparse_cli.data.examples import Examples
from meansparse_cli.operator.active import alpha_set
from meansparse_cli.operator.insertion import SparsifiedModel, insert
from meansparse_cli.operator.module import MeanSparse
from meansparse_cli.sites.find import find_sites

BUDGET = Budget("Linf", 8 / 255)


@pytest.fixture
def model() -> SparsifiedModel:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(48, 4)
    )
    sites = find_sites(net, torch.rand(2, 1, 6, 6))
    modules = [
        MeanSparse(torch.full((s.channels,), 0.1), torch.full((s.channels,), 0.3), 0.5, s.channel_axis) for s in sites
    ]
    return insert(net, sites, modules).eval().requires_grad_(False)


def evaluate(model: SparsifiedModel, x: Tensor, point: Tensor, **options: float | None) -> tuple[Tensor, Tensor]:
    """Logits at ``point``, and the loss that the attack climbs there."""
    settings = {"n_steps": 3, "p": 1, "q": 1, "weight": None} | options
    y, zeros, logits = torch.arange(len(x)) % 4, torch.zeros(len(x), dtype=torch.int64), []
    batch = {
        "x": x,
        "y": y,
        "target": y,
        "point": point,
        "best_point": x,
        "best_loss": torch.full((len(x),), -torch.inf),
    }
    batch |= {"step": zeros, "forward": zeros, "backward": zeros}
    handle = model.register_forward_hook(lambda module, args, output: logits.append(output.detach()))
    problem, counted = (
        Problem(model, BUDGET, 4, seed=0, batch_size=4),
        CountedModel(model, n_classes=4, device=x.device),
    )
    AdaptiveRule(problem, **settings).look(counted, batch)  # type: ignore[arg-type]
    handle.remove()
    assert counted.forward_passes == 2 * len(x) and torch.equal(batch["forward"], zeros + 2)
    return logits[-1], batch["best_loss"]


@pytest.mark.parametrize(("p", "q"), [(1, 1), (2, 2), (2, 1)])
def test_the_loss_is_equation_9(model: SparsifiedModel, p: int, q: int) -> None:
    x, point = torch.rand(3, 1, 6, 6), torch.rand(3, 1, 6, 6)
    first, second = model.base[0], model.base[2]
    sparse = [model.at(site) for site in model.sites]
    penalty = torch.zeros(3)
    z, moved = first(x), first(point)
    for i in range(2):
        mask = ((z - 0.1).abs() <= 0.15).float()
        assert 0.05 < mask.mean() < 0.95
        penalty += ((z - moved) * mask).flatten(1).norm(p=p, dim=1) ** q
        if i == 0:
            z, moved = (second(F.gelu(sparse[0](t))) for t in (z, moved))
    logits, loss = evaluate(model, x, point, p=p, q=q, weight=0.7)
    ce = F.cross_entropy(model(point), torch.arange(3), reduction="none")
    torch.testing.assert_close(loss, ce - 0.7 * penalty, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits, model(point))
    by_default = evaluate(model, x, point, p=p, q=q)[1]
    torch.testing.assert_close(by_default, ce - penalty / (4 * 36 + 3 * 16), rtol=1e-4, atol=1e-5)


def test_an_activation_that_works_in_place_changes_nothing() -> None:
    losses = []
    for in_place in (False, True):
        torch.manual_seed(4)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(inplace=in_place), nn.Flatten(), nn.Linear(64, 4))
        sites = find_sites(net, torch.rand(2, 1, 6, 6))
        operators = [MeanSparse(torch.full((4,), 0.1), torch.full((4,), 0.3), 0.5, 1)]
        sparse = insert(net, sites, operators).eval().requires_grad_(False)
        x = torch.linspace(0, 1, 108).view(3, 1, 6, 6)
        losses.append(evaluate(sparse, x, (x + 0.1).clamp(0, 1), weight=0.7)[1])
    assert torch.equal(*losses)
    assert not torch.equal(losses[0], evaluate(sparse, x, (x + 0.1).clamp(0, 1), weight=0.0)[1])


def test_it_is_pgd_without_penalty_and_on_the_base_model(model: SparsifiedModel) -> None:
    x = torch.rand(6, 1, 6, 6)
    y = model(x).argmax(1)

    def points(rule: PGDRule) -> Tensor:
        return search(task_of("a", model, x, y, BUDGET), rule).points

    problem = Problem(model, BUDGET, 4, seed=0, batch_size=4)
    plain = PGDRule(problem, n_steps=5, step_size=1 / 255)
    assert torch.equal(points(AdaptiveRule(problem, n_steps=5, p=1, q=1, weight=0.0)), points(plain))
    fined = AdaptiveRule(problem, n_steps=5, p=1, q=1, weight=5.0)
    assert not torch.equal(points(fined), points(plain))
    with alpha_set(model, 0.0):
        assert torch.equal(points(fined), points(plain))


@pytest.mark.parametrize("alpha", [0.0, 0.15])
def test_without_a_mask_or_a_fine_all_of_them_are_one_attack(model: SparsifiedModel, alpha: float) -> None:
    """From the same start: the base model has one accuracy under each of them (the paper's Table 5)."""
    x = torch.rand(6, 1, 6, 6)
    names = ["adaptive-1-1:0", "adaptive-2-2:0"] if alpha else ["adaptive-1-1:0", "adaptive-1-1", "adaptive-2-2"]
    with alpha_set(model, alpha):
        y = model(x).argmax(1)
        first, *others = (climb_points(model, x, y, BUDGET, name) for name in names)
    assert not torch.equal(first, x)
    assert all(torch.equal(first, other) for other in others)


def test_an_attack_of_that_family_is_given_the_start_of_all(
    model: SparsifiedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: list[str] = []
    monkeypatch.setattr(runner, "search", lambda task, rule: began.append(task.attack) or search(task, rule))
    x = torch.rand(2, 1, 6, 6)
    for name in ("adaptive-1-1:0", "adaptive-2-2", "pgd-50"):
        run_attack(name, Problem(model, BUDGET, 4, 0, batch_size=2), Examples(x, model(x).argmax(1), torch.arange(2)))
    assert set(began[:-1]) == {"adaptive"} and began[-1] == "pgd-50"


def test_a_heavy_fine_keeps_masked_features_where_they_are(model: SparsifiedModel) -> None:
    x = torch.rand(4, 1, 6, 6)
    y = model(x).argmax(1)
    tiny = Budget("Linf", 1 / 255)  # nothing breaks, so that every image is the best of 50 steps

    def moved(name: str) -> float:
        points = climb_points(model, x, y, tiny, name)
        z, z_moved = model.base[0](x), model.base[0](points)
        return float(((z - z_moved) * ((z - 0.1).abs() <= 0.15)).abs().sum())

    assert moved("adaptive-1-1:100") < 0.8 * moved("adaptive-1-1:0")


def task_of(attack: str, model: SparsifiedModel, x: Tensor, y: Tensor, budget: Budget) -> AttackTask:
    examples, counted = Examples(x, y, torch.arange(len(x))), CountedModel(model, n_classes=4, device=x.device)
    return AttackTask(attack, counted, Problem(model, budget, 4, seed=0, batch_size=4), examples, model(x))


def climb_points(model: SparsifiedModel, x: Tensor, y: Tensor, budget: Budget, name: str) -> Tensor:
    from meansparse_cli.attacks import find_attack

    spec = find_attack(name)
    task = task_of(spec.start, model, x, y, budget)
    return search(task, runner.SEARCHES[spec.search](task.problem, **dict(spec.options))).points


def test_no_hook_is_left_and_half_precision_works(model: SparsifiedModel) -> None:
    x = torch.rand(4, 1, 6, 6)
    y = model(x).argmax(1)
    for name in ("adaptive-1-1", "adaptive-2-1"):
        problem = Problem(model, BUDGET, n_classes=4, seed=0, batch_size=4, precision="bf16")
        result = run_attack(name, problem, Examples(x, y, torch.arange(4)))
        assert torch.isfinite(result.adversarial).all()
    for module in model.modules():
        if isinstance(module, MeanSparse):
            assert not module._forward_pre_hooks
