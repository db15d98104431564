"""APGD against pyautoattack's: the same start has to give the same trajectory, step by step."""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from meansparse_cli.attacks.apgd import APGDRule
from meansparse_cli.attacks.budget import boundary_start, example_generator, uniform_start
from meansparse_cli.attacks.judge import CountedModel
from meansparse_cli.attacks.losses import (
    choose_loss,
    dlr,
    margin,
    probability_margin,
    targeted_dlr,
    targeted_margin,
    targeted_probability_margin,
)
from meansparse_cli.attacks.problem import Budget, Problem
from meansparse_cli.attacks.queue import AttackTask, SearchOutcome, search
from meansparse_cli.attacks.targets import likely_targets
from meansparse_cli.data.examples import Examples

N_EXAMPLES = 10
BUDGETS = {"Linf": Budget("Linf", 0.04), "L2": Budget("L2", 0.35)}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class SmoothNet(nn.Module):
    """Computes in float64, so that a result does not depend on the batch it was computed in; remembers its inputs."""

    def __init__(self, n_classes: int, channels_last: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(8 * 6 * 6, n_classes)
        ).double()
        if channels_last:
            self.net = self.net.to(memory_format=torch.channels_last)
        self.visited: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.visited.append(x.detach().clone())
        return (4 * self.net(x.double())).float()


def make_net(n_classes: int = 6, channels_last: bool = False) -> SmoothNet:
    torch.manual_seed(3)
    return SmoothNet(n_classes, channels_last).requires_grad_(False).eval()


def make_task(net: nn.Module, budget: Budget, *, n_classes: int, batch_size: int = 4, seed: int = 0) -> AttackTask:
    generator = torch.Generator().manual_seed(11)
    x = torch.rand(N_EXAMPLES, 3, 6, 6, generator=generator)
    logits = net(x)
    return AttackTask(
        attack="apgd-ce",
        model=CountedModel(net, n_classes=n_classes, device=x.device),
        problem=Problem(net, budget, n_classes, seed, batch_size),
        examples=Examples(x, logits.argmax(dim=1), torch.arange(100, 100 + N_EXAMPLES)),
        clean_logits=logits,
    )


def some_of(task: AttackTask, rows: Tensor, batch_size: int) -> AttackTask:
    problem = replace(task.problem, batch_size=batch_size)
    return replace(task, problem=problem, examples=task.examples.at(rows), clean_logits=task.clean_logits[rows])


def theirs(loss: str, net: SmoothNet, task: AttackTask, n_steps: int) -> object:
    autopgd = pytest.importorskip("pyautoattack.autopgd_base")
    settings = {
        "n_iter": n_steps,
        "norm": task.problem.budget.norm,
        "eps": task.problem.budget.eps,
        "device": "cpu",
        "logger": logging.getLogger(),
    }
    if loss == "dlr-targeted":
        attack = autopgd.APGDAttack_targeted(net, **settings)
        attack.y_target = likely_targets(task.clean_logits)[:, 0]
    else:
        attack = autopgd.APGDAttack(net, loss=loss, **settings)
    attack.init_hyperparam(task.examples.x)
    return attack


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
@pytest.mark.parametrize("n_steps", [100, 7])
def test_same_trajectory_as_pyautoattack(loss: str, norm: str, n_steps: int) -> None:
    net = make_net()
    task = make_task(net, BUDGETS[norm], n_classes=6)
    x, y = task.examples.x, task.examples.y
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(5)) - 0.5
    starts = (x + task.problem.budget.eps * 0.2 * noise).clamp(0, 1)
    net.visited.clear()
    best, correct, best_loss, _ = theirs(loss, net, task, n_steps).attack_single_run(x, y, x_init=starts)
    their_points = torch.stack(net.visited)  # (n_steps + 1, n, channels, height, width)

    rule = APGDRule(task.problem, loss=loss, n_steps=n_steps, n_attempts=1)  # type: ignore[arg-type]

    def run(one: AttackTask, start: Tensor) -> SearchOutcome:
        rule.start = lambda image, generator, budget: start
        return search(one, rule)

    n_broken = 0
    for example in range(N_EXAMPLES):
        net.visited.clear()
        outcome = run(some_of(task, torch.tensor([example]), 1), starts[example])
        our_points = torch.cat(net.visited)
        torch.testing.assert_close(our_points, their_points[: len(our_points), example], rtol=0, atol=1e-6)
        assert outcome.claimed.item() == (not correct[example])
        if outcome.claimed:
            n_broken += 1
            assert net(outcome.points).argmax() != y[example]
        else:
            assert len(our_points) == n_steps + 1
            torch.testing.assert_close(outcome.points[0], best[example], rtol=0, atol=1e-6)
            loss_there = rule.loss(net(outcome.points), y[[example]], likely_targets(task.clean_logits)[[example], 0])
            torch.testing.assert_close(loss_there[0], best_loss[example], rtol=1e-5, atol=1e-6)
    assert 0 < n_broken < N_EXAMPLES, "the test network should leave some examples standing and some not"


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
def test_result_does_not_depend_on_batch_size_order_or_company(loss: str, norm: str) -> None:
    net = make_net()

    def attack(task: AttackTask) -> SearchOutcome:
        """From two starts an example where one is the rule: the second waits behind the others."""
        if loss == "dlr-targeted":
            return search(task, APGDRule(task.problem, loss=loss, n_steps=20))
        return search(task, APGDRule(task.problem, loss=loss, n_steps=20, n_attempts=2))  # type: ignore[arg-type]

    def run(batch_size: int, order: Tensor) -> tuple[Tensor, Tensor]:
        outcome = attack(some_of(make_task(net, BUDGETS[norm], n_classes=6), order, batch_size))
        back = order.argsort()
        return outcome.points[back], outcome.claimed[back]

    in_order = torch.arange(N_EXAMPLES)
    points, claimed = run(N_EXAMPLES, in_order)
    assert 0 < claimed.sum() < N_EXAMPLES
    for batch_size, order in ((1, in_order), (3, in_order.flip(0)), (8, torch.tensor([4, 9, 0, 7, 2, 1, 8, 3, 6, 5]))):
        other_points, other_claimed = run(batch_size, order)
        assert torch.equal(claimed, other_claimed)
        assert torch.equal(points, other_points)
    few = torch.tensor([7, 2])
    alone = some_of(make_task(net, BUDGETS[norm], n_classes=6), few, 2)
    assert torch.equal(attack(alone).points, points[few])


def test_starts_differ_by_seed_attack_attempt_and_example() -> None:
    image = torch.full((3, 6, 6), 0.5)
    for start in (boundary_start, uniform_start):
        for budget in BUDGETS.values():
            keys = [(0, "apgd-ce", 0, 7), (1, "apgd-ce", 0, 7), (0, "apgd-dlr", 0, 7), (0, "apgd-ce", 1, 7)]
            points = [start(image, example_generator(*key), budget) for key in [*keys, (0, "apgd-ce", 0, 8)]]
            again = start(image, example_generator(*keys[0]), budget)
            assert torch.equal(points[0], again)
            assert not any(torch.equal(points[0], other) for other in points[1:])
            deltas = torch.stack(points) - image
            size = deltas.abs().amax(dim=(1, 2, 3)) if budget.norm == "Linf" else deltas.flatten(1).norm(dim=1)
            assert (size <= budget.eps * (1 + 1e-5)).all()
            if start is boundary_start:
                assert (size >= budget.eps * (1 - 1e-5)).all()


def test_batch_stays_full_and_broken_examples_leave() -> None:
    net = make_net()
    task = make_task(net, BUDGETS["Linf"], n_classes=6, batch_size=4)
    net.visited.clear()
    finished: list[int] = []
    task = replace(task, advance=finished.append)
    outcome = search(task, APGDRule(task.problem, loss="ce", n_steps=20))
    sizes = [len(batch) for batch in net.visited]
    first_short = next(step for step, size in enumerate(sizes) if size < 4)
    assert all(size < 4 for size in sizes[first_short:]), "a batch was short while examples were waiting"
    n_survivors = int((~outcome.claimed).sum())
    assert 21 * n_survivors < sum(sizes) < 21 * N_EXAMPLES
    assert sum(finished) == N_EXAMPLES


def test_retries_share_the_batch_and_progress_is_smooth() -> None:
    net = make_net()
    task = make_task(net, Budget("Linf", 1e-4), n_classes=6, batch_size=4)  # nothing breaks
    finished: list[int] = []
    task = replace(task, advance=finished.append)
    before = task.model.forward_passes
    search(task, APGDRule(task.problem, loss="dlr-targeted", n_steps=10))
    assert task.model.forward_passes - before == N_EXAMPLES * 5 * 11
    assert finished == [1] * N_EXAMPLES


def test_channels_last_network_and_images() -> None:
    plain = make_net()
    last = make_net(channels_last=True)
    for norm in ("Linf", "L2"):
        task = make_task(plain, BUDGETS[norm], n_classes=6)
        expected = search(task, APGDRule(task.problem, n_steps=20))
        task = make_task(last, BUDGETS[norm], n_classes=6)
        x = task.examples.x.to(memory_format=torch.channels_last)
        task = replace(task, examples=replace(task.examples, x=x))
        found = search(task, APGDRule(task.problem, n_steps=20))
        assert torch.equal(found.claimed, expected.claimed)
        torch.testing.assert_close(found.points, expected.points, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "n_classes", "expected"),
    [
        ("dlr", 2, margin),
        ("dlr", 3, dlr),
        ("dlr-targeted", 2, targeted_margin),
        ("dlr-targeted", 3, targeted_margin),
        ("dlr-targeted", 4, targeted_dlr),
    ],
)
def test_loss_for_few_classes(name: str, n_classes: int, expected: Callable[..., Tensor]) -> None:
    assert choose_loss(name, n_classes) is expected  # type: ignore[arg-type]


def test_losses_by_hand() -> None:
    logits = torch.tensor([[5.0, 3.0, 1.0, 0.0], [5.0, 3.0, 1.0, 0.0]])
    y, target = torch.tensor([0, 1]), torch.tensor([2, 3])
    assert margin(logits, y, target).tolist() == [-2.0, 2.0]
    assert dlr(logits, y, target).tolist() == [-0.5, 0.5]
    assert targeted_margin(logits, y, target).tolist() == [-4.0, -3.0]
    torch.testing.assert_close(targeted_dlr(logits, y, target), torch.tensor([-4.0, -3.0]) / 4.5)
    even = torch.tensor([[4.0, 3.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]]).log()  # probabilities 0.4, 0.3, 0.2, 0.1
    torch.testing.assert_close(probability_margin(even, y, target), torch.tensor([-0.1, 0.1]))
    torch.testing.assert_close(targeted_probability_margin(even, y, target), torch.tensor([-0.2, -0.2]))


def test_targets_are_the_likeliest_other_classes() -> None:
    logits = torch.tensor([[0.0, 9.0, 4.0, 6.0]])
    assert likely_targets(logits).tolist() == [[3, 2, 0]]
    assert likely_targets(torch.randn(2, 12)).shape == (2, 9)
