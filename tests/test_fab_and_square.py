"""Our FAB-T and Square against pyautoattack's: the same pieces, and as many examples broken."""

import pytest
import torch
from torch import Tensor, nn

from meansparse_cli.attacks.fab import FABRule, project_on_boundary
from meansparse_cli.attacks.judge import CountedModel
from meansparse_cli.attacks.problem import Budget, Problem
from meansparse_cli.attacks.queue import AttackTask, search
from meansparse_cli.attacks.square import SquareRule, pattern_of, side_of
from meansparse_cli.data.examples import Examples

BUDGETS = [Budget("Linf", 0.04), Budget("L2", 0.35)]
budgets = pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.norm)
N = 30


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(8 * 100, 6))

    def forward(self, x: Tensor) -> Tensor:
        return 4 * self.net(x)


def make_task(budget: Budget, batch_size: int = 16, rows: Tensor | None = None) -> AttackTask:
    net = Net().requires_grad_(False).eval()
    x = torch.rand(N, 3, 10, 10, generator=torch.Generator().manual_seed(6))
    rows = torch.arange(N) if rows is None else rows
    logits = net(x)[rows]
    model = CountedModel(net, n_classes=6, device=x.device)
    examples = Examples(x[rows], logits.argmax(1), rows)
    return AttackTask("a", model, Problem(net, budget, 6, 0, batch_size), examples, logits)


def test_square_has_autoattacks_schedule_and_patterns() -> None:
    theirs = pytest.importorskip("pyautoattack.square").SquareAttack(None, resc_schedule=False, norm="L2", device="cpu")
    for query in [1, 11, 12, 51, 52, 201, 202, 500, 502, 1002, 2002, 4002, 5000]:
        side = max(round((theirs.p_selection(query - 1) * 100) ** 0.5), 1)
        assert side_of(query, BUDGETS[0], 10, 10) == min(side, 10), query
    for side in range(1, 12):
        pattern, expected = pattern_of(side), theirs.eta(side)
        assert torch.allclose(pattern, expected) or torch.allclose(pattern.T, expected), side
        assert pattern.norm().item() == pytest.approx(1.0)


@budgets
def test_square_breaks_as_many_as_autoattacks(budget: Budget) -> None:
    theirs = pytest.importorskip("pyautoattack.square").SquareAttack
    budget = Budget(budget.norm, budget.eps * (1 if budget.norm == "Linf" else 2))
    task = make_task(budget)
    settings = {"norm": budget.norm, "eps": budget.eps, "n_queries": 200, "p_init": 0.8, "resc_schedule": False}
    with torch.random.fork_rng():
        raw = theirs(task.model.model, **settings, seed=0, device="cpu").perturb(task.examples.x, task.examples.y)
    n_theirs = int((task.model.model(raw).argmax(1) != task.examples.y).sum())
    outcome = search(task, SquareRule(task.problem, n_queries=200))
    n_ours = int(outcome.claimed.sum())
    assert 5 < n_theirs < N - 5, "the test network should leave some examples standing and some not"
    assert abs(n_ours - n_theirs) <= 4
    assert outcome.passes[:, 0].sum() == task.model.forward_passes
    assert (outcome.passes[~outcome.claimed, 0] <= 201).all()
    assert outcome.passes[outcome.claimed, 0].float().mean() < 100  # the fallen leave
    delta = (outcome.points - task.examples.x).flatten(1)
    size = delta.abs().amax(1) if budget.norm == "Linf" else delta.norm(dim=1)
    assert (size <= budget.eps * (1 + 1e-5)).all()


def test_square_does_not_ask_what_it_knows() -> None:
    task = make_task(Budget("Linf", 0.002))  # nothing breaks
    outcome = search(task, SquareRule(task.problem, n_queries=400))
    assert not outcome.claimed.any()
    assert (outcome.passes[:, 0] <= 401).all() and outcome.passes[:, 0].sum() < 0.99 * 401 * N


@budgets
def test_square_and_fab_do_not_depend_on_company(budget: Budget) -> None:
    for make in (lambda problem: SquareRule(problem, n_queries=60), lambda problem: FABRule(problem, n_steps=8)):
        task = make_task(budget, batch_size=N)
        whole = search(task, make(task.problem))
        rows = torch.tensor([7, 21, 2, 18, 25])
        task = make_task(budget, batch_size=2, rows=rows)
        part = search(task, make(task.problem))
        assert torch.equal(part.claimed, whole.claimed[rows])
        torch.testing.assert_close(part.points, whole.points[rows], rtol=0, atol=1e-4)


@budgets
def test_projection_is_autoattacks(budget: Budget) -> None:
    projections = pytest.importorskip("pyautoattack.fab_projections")
    theirs = projections.projection_linf if budget.norm == "Linf" else projections.projection_l2
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(60, 3, 4, 4, generator=generator).round(decimals=1)  # some pixels at 0 and 1
    normal = torch.randn(60, 3, 4, 4, generator=generator)
    gap = torch.randn(60, generator=generator) * 4
    offset = (normal * points).flatten(1).sum(1) - gap
    expected = theirs(points.flatten(1), normal.flatten(1), offset)
    found = project_on_boundary(points, normal, gap, budget.norm).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    reached = gap + (normal.flatten(1) * found).sum(1)
    assert reached.abs().max() < 1e-3


def test_projection_of_a_zero_gradient_and_of_what_cannot_be_reached() -> None:
    points = torch.full((2, 1, 2, 2), 0.5)
    normal = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    for norm in ("Linf", "L2"):
        move = project_on_boundary(points, normal, torch.tensor([1.0, -10.0]), norm)
        assert torch.equal(move[0], torch.zeros(1, 2, 2))
        torch.testing.assert_close(move[1], torch.full((1, 2, 2), 0.5))


@budgets
def test_fab_breaks_as_many_as_autoattacks(budget: Budget) -> None:
    theirs = pytest.importorskip("pyautoattack.fab_pt").FABAttack_PT
    budget = Budget(budget.norm, budget.eps / 2)
    task = make_task(budget)
    settings = {"norm": budget.norm, "eps": budget.eps, "n_iter": 20, "targeted": True, "n_target_classes": 5}
    with torch.random.fork_rng():
        raw = theirs(task.model.model, **settings, device="cpu").perturb(task.examples.x, task.examples.y)
    distance = (
        (raw - task.examples.x).flatten(1).abs().amax(1)
        if budget.norm == "Linf"
        else (raw - task.examples.x).flatten(1).norm(dim=1)
    )
    broken = (task.model.model(raw).argmax(1) != task.examples.y) & (distance <= budget.eps)
    task.model.forward_passes = 0
    outcome = search(task, FABRule(task.problem, n_steps=20))
    assert 5 < broken.sum() < N - 5, "the test network should leave some examples standing and some not"
    assert (outcome.claimed != broken).sum() <= 1
    assert outcome.passes[:, 0].sum() == task.model.forward_passes
    standing = outcome.passes[~outcome.claimed]
    assert (standing[:, 1] == 5 * 20).all()
    assert standing[:, 0].float().mean() < 1.7 * 100  # pyautoattack's: 2 forward passes a step
