"""Doubts: two controls, one network for each way an evaluation goes wrong, and the numbers where they are known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from meansparse_cli import diagnostics
from meansparse_cli.attacks.problem import Budget, Problem
from meansparse_cli.data.examples import Examples
from meansparse_cli.diagnostics import Diagnostic, KeptAnswers, diagnose, search
from meansparse_cli.diagnostics.outcomes import check_outcomes
from meansparse_cli.diagnostics.subject import Subject
from meansparse_cli.engine.comparison import Evaluation
from meansparse_cli.engine.evaluate import EvaluationRun, Plan
from meansparse_cli.engine.outcomes import ModelOutcomes, Spent
from meansparse_cli.engine.state import StateFolder
from meansparse_cli.operator.insertion import SparsifiedModel, insert
from meansparse_cli.operator.module import MeanSparse
from meansparse_cli.sites.find import find_sites

EPS, N, SIZE = 8 / 255, 16, 4


class Colours(nn.Module):
    """Undefended: the class is the brightest of three channels, the logits are smooth in every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return 40 * self.act(x).mean((2, 3))


class Quantised(Colours):
    """The zero-gradient control: no plain gradient, and none straight through MeanSparse, passes the rounding."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((16 * x).round() / 16)


class Randomised(Colours):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + 0.3 * torch.randn_like(logits)


class Probabilities(Colours):
    def forward(self, x: Tensor) -> Tensor:
        return (super().forward(x) / 8).softmax(dim=1)


class BatchStatistics(Colours):
    """Normalises by the batch at hand, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class ForgottenNorm(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> "ForgottenNorm":
        return super().train(True)


class TrainingMode(BatchStatistics):
    def __init__(self) -> None:
        super().__init__()
        self.norm = ForgottenNorm(3)


class Unnormalised(Colours):
    """Was trained on images in [0, 255]: all that lies below 100 is black to it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 100)


def examples(n: int = N) -> tuple[Tensor, Tensor, Tensor]:
    """Grey images with a channel that is brighter by 0.06 on average, so that 8/255 can turn it and noise cannot."""
    generator = torch.Generator().manual_seed(3)
    y = torch.arange(n) % 3
    x = 0.4 + 0.1 * torch.rand(n, 3, SIZE, SIZE, generator=generator)
    x = x - x.mean((2, 3), keepdim=True) + 0.45
    x[torch.arange(n), y] += torch.linspace(0.03, 0.09, n).view(-1, 1, 1)
    return x, y, torch.arange(n)


def sparsified(base: nn.Module, alpha: float) -> SparsifiedModel:
    sites = find_sites(base.eval(), examples(4)[0])
    return insert(base, sites, [MeanSparse(torch.full((3,), 0.45), torch.full((3,), 0.05), alpha) for _ in sites])


def doubts_of(
    base: nn.Module,
    tmp_path: Path,
    *,
    alpha: float = 0.0,
    attacks: tuple[str, ...] = ("apgd-ce", "bpda-apgd-ce"),
    batch_size: int = 256,
    kept: KeptAnswers | None = None,
) -> dict[tuple[str, str], Diagnostic]:
    x, y, indices = examples()
    model = sparsified(base, alpha)
    problem = Problem(model, Budget("Linf", EPS), n_classes=3, seed=0, batch_size=256, precision="fp32")
    evaluation = EvaluationRun(problem, Examples(x, y, indices), Plan(attacks, alpha), StateFolder(tmp_path)).attack()
    problem = Problem(model, Budget("Linf", EPS), 3, 0, batch_size)
    found, _ = diagnose(problem, Examples(x, y, indices), evaluation, kept=kept)
    return {(doubt.model, doubt.name): doubt for doubt in found}


def warned(doubts: dict[tuple[str, str], Diagnostic]) -> set[str]:
    return {doubt.name for doubt in doubts.values() if doubt.status == "warn"}


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "N_STEPS", 10)
    monkeypatch.setattr(search, "N_DRAWS", 5)


# ---- the two controls


def test_an_undefended_network_falls_to_zero_and_raises_no_doubt(tmp_path: Path) -> None:
    doubts = doubts_of(Colours(), tmp_path)
    assert warned(doubts) == set(), [d for d in doubts.values() if d.status == "warn"]
    large = doubts["base", "robust accuracy at a large eps"]
    assert (large.status, large.value) == ("pass", 0.0)
    assert {name for name, d in doubts.items() if d.status == "not run"} == {
        ("base", "Square beats white-box attacks"),
        ("base", "transfer beats white-box attacks"),
    }


def test_a_network_without_gradients_is_flagged(tmp_path: Path) -> None:
    doubts = doubts_of(Quantised(), tmp_path)
    assert doubts["base", "zero or NaN gradients"].value == 1.0
    assert warned(doubts) == {"zero or NaN gradients", "robust accuracy at a large eps"}, doubts


def test_a_loss_that_still_rises_and_one_that_has_settled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def climb_like(curve: Tensor) -> Callable[..., Tensor]:
        def fake(subject: Subject, rows: Tensor, budget: Budget, **options: Any) -> Tensor:
            if (history := options.get("history")) is not None:
                history[:] = curve
            return torch.zeros(len(rows), dtype=torch.bool)

        return fake

    steps = torch.arange(100.0)
    for curve, status, value in ((steps, "warn", 1.0), (1 - 0.9**steps, "pass", 0.0), (0 * steps, "pass", 0.0)):
        monkeypatch.setattr(search, "climb_again", climb_like(curve))
        doubt = doubts_of(Colours(), tmp_path)["base", "loss still rising at the last step"]
        assert (doubt.status, doubt.value) == (status, value)


@pytest.mark.usefixtures("few_steps")
def test_examples_that_were_never_really_attacked() -> None:
    """Called robust though nothing was tried: noise and another APGD break them, and both doubts say so."""
    x, y, indices = examples()
    every = torch.ones(N, dtype=torch.bool)
    budget = Budget("Linf", 0.4)
    examined = Examples(x, y, indices)
    problem = Problem(sparsified(Colours(), 0.0), budget, 3, 0, 256)
    subject = Subject("base", problem, examined, every, every, True)
    found = {doubt.name: doubt for doubt in search.check_search(subject)}
    assert found["more steps and another start"].value == 1.0
    assert found["more steps and another start"].status == "warn"
    assert found["noise breaks what attacks left"].value > 0  # type: ignore[operator]
    assert found["noise breaks what attacks left"].status == "warn"
    assert found["accuracy lost to random noise"].status == "warn"


# ---- one network for each doubt


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (Probabilities, {"outputs that are probabilities"}),
        (BatchStatistics, {"depends on the rest of the batch"}),
        (TrainingMode, {"depends on the rest of the batch", "modules in training mode"}),
        (Randomised, {"randomised output"}),
        (Unnormalised, {"better with other inputs", "zero or NaN gradients"}),
    ],
)
@pytest.mark.usefixtures("few_steps")
def test_its_own_doubt_and_no_other(network: Callable[[], nn.Module], expected: set[str], tmp_path: Path) -> None:
    doubts = doubts_of(network(), tmp_path)
    about_outputs = {"randomised output", "depends on the rest of the batch", "modules in training mode"} | {
        "outputs that are probabilities",
        "better with other inputs",
        "zero or NaN gradients",
    }
    assert warned(doubts) & about_outputs == expected, doubts


class Strict(Colours):
    """Refuses what is no image, as a careful author's model may."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.min() >= 0 and x.max() <= 1
        return super().forward(x)


@pytest.mark.usefixtures("few_steps")
def test_a_model_that_checks_its_inputs_is_doubted_like_any_other(tmp_path: Path) -> None:
    doubts = doubts_of(Strict(), tmp_path)
    assert doubts["base", "better with other inputs"].status == "not run"
    assert "refuses" in doubts["base", "better with other inputs"].sentence


@pytest.mark.usefixtures("few_steps")
def test_a_batch_size_of_one_hides_no_batch_statistics(tmp_path: Path) -> None:
    doubts = doubts_of(BatchStatistics(), tmp_path, batch_size=1)
    assert "depends on the rest of the batch" in warned(doubts)


# ---- the numbers, where they are known


@pytest.mark.usefixtures("few_steps")
def test_what_the_operator_masks(tmp_path: Path) -> None:
    doubts = doubts_of(Colours(), tmp_path, alpha=1.0)
    masked = doubts["sparsified", "features masked, mean of sites"]
    share = float(((examples()[0] - 0.45).abs() <= torch.tensor(0.05)).float().mean())
    assert masked.value == pytest.approx(share, abs=1e-6)
    assert masked.details["sites"] == {"act": pytest.approx(share, abs=1e-6)}
    assert masked.status == "warn"
    assert ("base", "features masked, mean of sites") not in doubts
    # a linear network's gradient is the same at every pixel: the cosine is the square root of the share that passes
    cosine = doubts["sparsified", "cosine of plain and BPDA gradient"]
    assert cosine.value is not None
    assert 0 < cosine.value < 1
    assert cosine.status == "warn"
    assert doubts["sparsified", "robust accuracy at a large eps"].value == 0.0


def test_outcomes_that_square_and_transfer_and_float32_make_doubtful() -> None:
    def outcomes(square: int, transfer: int, refused: int) -> ModelOutcomes:
        first = np.arange(1000)
        broken = {"apgd-ce": first < 100, "square": (first >= 100) & (first < 100 + square)}
        faced = {"apgd-ce": first >= 0, "square": first >= 100, "transfer": first >= 0}
        broken["transfer"] = (first >= 500) & (first < 500 + transfer)
        spent = {name: Spent() for name in broken} | {"apgd-ce": Spent(rejected=refused)}
        return ModelOutcomes(first >= 0, faced, broken, spent)

    evaluation = Evaluation(
        0.2,
        ("apgd-ce", "square"),
        np.arange(1000),
        np.zeros(1000, dtype=np.int64),
        outcomes(2, 10, 1),
        outcomes(3, 11, 2),
    )
    x, y, indices = examples(3)
    for name, status, values in (
        ("base", "pass", (0.002, 0.01, 1 / 103)),
        ("sparsified", "warn", (0.003, 0.011, 2 / 105)),
    ):
        problem = Problem(sparsified(Colours(), 0.0), Budget("Linf", EPS), 3, 0, 8)
        subject = Subject(name, problem, Examples(x, y, indices), y >= 0, y >= 0, True)  # type: ignore[arg-type]
        found = check_outcomes(subject, evaluation)
        assert [doubt.status for doubt in found] == [status] * 3
        assert [doubt.value for doubt in found] == pytest.approx(values)


def assert_kept(kept: KeptAnswers, first: dict[Any, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers under the key ``one`` are not asked for again; under another key they are."""
    asked: list[str] = []
    monkeypatch.setattr(diagnostics, "check_search", lambda subject: asked.append("search") or [])
    again = doubts_of(Colours(), folder / "evaluation", alpha=0.5, kept=kept)
    assert [d.to_report() for d in again.values()] == [d.to_report() for d in first.values()]
    assert asked == []
    doubts_of(Colours(), folder / "evaluation", alpha=0.5, kept=KeptAnswers(folder / "kept", "two"))
    assert asked == ["search", "search"]


@pytest.mark.usefixtures("few_steps")
def test_a_kind_that_was_answered_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = KeptAnswers(tmp_path / "kept", "one")
    first = doubts_of(Colours(), tmp_path / "evaluation", alpha=0.5, kept=kept)
    file = kept.ledger.folder / "sparsified-outputs.pt"
    file.write_bytes(file.read_bytes()[:100])  # not of ours: writes are atomic

    assert_kept(kept, first, tmp_path, monkeypatch)


@pytest.mark.usefixtures("few_steps")
def test_equal_runs_give_equal_doubts_and_leave_the_model_as_it_was(tmp_path: Path) -> None:
    first = doubts_of(Colours(), tmp_path / "one", alpha=0.5)
    second = doubts_of(Colours(), tmp_path / "two", alpha=0.5)
    assert [d.to_report() for d in first.values()] == [d.to_report() for d in second.values()]
