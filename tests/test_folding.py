"""Batch norms folded into convolutions: the same logits, only where nobody else reads the convolution, given back."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from meansparse_cli.attacks import runner, square
from meansparse_cli.attacks.folding import find_folds, folded
from meansparse_cli.attacks.problem import Budget, Problem
from meansparse_cli.attacks.runner import run_attack
from meansparse_cli.data.examples import Examples
from meansparse_cli.models.source import load_model, resolve_model

IMAGES = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """conv, norm, activation, twice; ``form`` says what is unusual about it."""

    def __init__(self, form: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(4)
        self.form = form
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3, groups=2), nn.BatchNorm2d(6, affine=form != "not affine")
        self.act, self.fc = nn.ReLU(inplace=form == "in place"), nn.Linear(6, 4)
        for norm in (self.norm1, self.norm2):
            norm.running_mean = torch.randn(6)
            norm.running_var = torch.rand(6) + 0.3
        nn.init.normal_(self.norm1.weight)
        nn.init.normal_(self.norm1.bias)
        self.eval()
        if form == "batch statistics":
            self.norm1 = nn.BatchNorm2d(6, track_running_stats=False).eval()
        if form == "hook":
            self.conv1.register_forward_hook(lambda module, args, out: out * 2)
        if form == "training":
            self.norm1.train()

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv1(x)
        if self.form == "norm reads something else":
            first = first * 1.5
        out = self.act(self.norm1(first))
        if self.form == "another reader":
            out = out + first
        if self.form == "two norms":
            out = out + self.norm2(first)
        if self.form == "called twice":
            out = out + self.conv1(x.flip(3))
        return self.fc(self.act(self.norm2(self.conv2(out))).mean(dim=(2, 3)))


@pytest.mark.parametrize("form", ["plain", "in place", "not affine"])
def test_folded_logits_and_gradients_are_those_of_the_model(form: str) -> None:
    net = Net(form)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    folds = find_folds(net, IMAGES)
    assert [(fold.conv, fold.norm) for fold in folds] == [(net.conv1, net.norm1), (net.conv2, net.norm2)]

    def logits_and_gradient() -> tuple[Tensor, Tensor]:
        x = IMAGES.clone().requires_grad_()
        logits = net(x)
        return logits.detach(), torch.autograd.grad(logits[:, 1].sum(), x)[0]

    plain = logits_and_gradient()
    with pytest.raises(KeyboardInterrupt), folded(folds):
        for found, wanted in zip(logits_and_gradient(), plain, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(net.norm1(IMAGES), IMAGES)  # its work is done by the convolution
        raise KeyboardInterrupt
    after = net.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert all(torch.equal(found, wanted) for found, wanted in zip(logits_and_gradient(), plain, strict=True))


@pytest.mark.parametrize(
    ("form", "n_folds"),
    [
        ("norm reads something else", 1),
        ("two norms", 0),
        ("called twice", 1),
        ("hook", 1),
        ("training", 1),
        ("batch statistics", 1),
        ("another reader", 0),  # found out by the logits; nothing is folded then
    ],
)
def test_what_would_change_the_logits_is_left_alone(form: str, n_folds: int) -> None:
    net = Net(form)
    folds = find_folds(net, IMAGES)
    assert len(folds) == n_folds and all(fold.conv is net.conv2 for fold in folds)
    assert not net.norm1._forward_pre_hooks and "forward" not in vars(net.norm1)


def test_every_norm_of_the_embedded_resnet_is_folded() -> None:
    model = load_model(resolve_model("resnet18-w16"), None).eval()
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    folds = find_folds(model, x)
    assert len(folds) == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules()) == 20
    with torch.no_grad():
        plain = model(x)
        with folded(folds):
            torch.testing.assert_close(model(x), plain, rtol=1e-5, atol=1e-5)


class _Watched(nn.BatchNorm2d):
    """Not exactly a BatchNorm2d: who has an own class is not folded."""


def test_only_the_classes_themselves_are_folded() -> None:
    net = Net()
    watched = _Watched(6).eval()
    watched.load_state_dict(net.norm1.state_dict())
    net.norm1 = watched
    assert [fold.norm for fold in find_folds(net, IMAGES)] == [net.norm2]


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many folds each search was given."""
    given: list[int] = []

    def watching(model: nn.Module, x: Tensor) -> list[object]:
        folds = find_folds(model, x)
        given.append(len(folds))
        return folds  # type: ignore[return-value]

    monkeypatch.setattr(runner, "find_folds", watching)
    yield given


@pytest.mark.parametrize("attack", ["apgd-ce", "fab-t", "square", "pgd-50"])
def test_an_attack_finds_folded_what_it_finds_unfolded(
    attack: str, forms: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(square, "N_QUERIES", 500)
    net = Net()
    with torch.no_grad():
        net.fc.bias -= net(IMAGES).mean(dim=0)  # several classes
    y = net(IMAGES).argmax(dim=1)

    def outcome() -> tuple[Tensor, Tensor]:
        problem = Problem(net, Budget("Linf", 0.02), n_classes=4, seed=0, batch_size=4)
        result = run_attack(attack, problem, Examples(IMAGES, y, torch.arange(len(y))))
        return result.broken, net(result.adversarial).argmax(dim=1) != y

    broken, judged = outcome()
    assert forms == [2] and torch.equal(broken, judged)
    monkeypatch.setattr(runner, "find_folds", lambda model, x: [])
    assert torch.equal(outcome()[0], broken)
    assert 0 < broken.sum() < len(broken)
