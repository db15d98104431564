"""A faster search does not change who is the judge: precision, memory format, compilation, passes an example."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from meansparse_cli.attacks.problem import Budget, Problem, search_form
from meansparse_cli.attacks.runner import run_attack
from meansparse_cli.data.examples import Examples
from meansparse_cli.engine.comparison import Evaluation
from meansparse_cli.engine.evaluate import EvaluationRun, Plan
from meansparse_cli.engine.state import StateFolder
from meansparse_cli.errors import ArtifactError, ConfigError
from meansparse_cli.operator.device import Precision, float32_set_to, precision_on, search_precision
from meansparse_cli.operator.insertion import SparsifiedModel, insert
from meansparse_cli.operator.module import MeanSparse
from meansparse_cli.sites.find import find_sites

BUDGET = Budget("Linf", 0.06)
ATTACKS = ("apgd-ce", "bpda-apgd-ce", "base-gradient-apgd-ce", "soft-0.2-apgd-ce")


class Net(nn.Module):
    """Notes in what precision it was asked."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.head = nn.Conv2d(3, 6, 3), nn.GELU(), nn.Linear(6 * 36, 4)
        self.autocast: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        logits: Tensor = self.head(self.act(self.conv(x)).flatten(1))
        return logits


def make() -> tuple[SparsifiedModel, Tensor, Tensor]:
    net = Net().eval()
    x = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    net.head.bias.data -= net(x).mean(0).detach()
    sites = find_sites(net, x)
    model = insert(net, sites, [MeanSparse(torch.zeros(6), torch.full((6,), 0.4), 0.3)])
    net.autocast.clear()
    return model, x, model(x).argmax(1)


def run(
    folder: Path,
    attacks: tuple[str, ...] = ATTACKS,
    precision: Precision = "fp32",
    compile: bool = False,
    channels_last: bool = False,
) -> Evaluation:
    model, x, y = make()
    form = search_form(model, compile=compile, channels_last=channels_last)
    problem = Problem(model, BUDGET, 4, seed=0, batch_size=5, precision=precision, search_model=form)
    return EvaluationRun(problem, Examples(x, y, torch.arange(16)), Plan(attacks, 0.3), StateFolder(folder)).attack()


def test_bf16_searches_and_float32_judges() -> None:
    model, x, y = make()
    examples, problem = Examples(x, y, torch.arange(16)), Problem(model, BUDGET, 4, seed=0, batch_size=16)
    exact = run_attack("apgd-ce", replace(problem, precision="fp32"), examples)
    assert not any(model.base.autocast)
    model.base.autocast.clear()
    result = run_attack("apgd-ce", replace(problem, precision="bf16"), examples)
    asked = model.base.autocast
    assert not asked[0] and any(asked) and not asked[-1]
    assert 0 < exact.broken.sum() < 16
    assert abs(int(result.broken.sum()) - int(exact.broken.sum())) <= 2
    with torch.no_grad():
        assert torch.equal(model(result.adversarial).argmax(1) != y, result.broken)


def test_what_a_faster_form_breaks_and_the_model_does_not_is_searched_again() -> None:
    class Wrong(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.model(x)
            return logits.roll(1, dims=1)

    model, x, y = make()
    examples, problem = Examples(x, y, torch.arange(16)), Problem(model, BUDGET, 4, seed=0, batch_size=16)
    alone = run_attack("apgd-ce", problem, examples)
    misled = run_attack("apgd-ce", replace(problem, search_model=Wrong(model)), examples)
    assert torch.equal(misled.broken, alone.broken)
    assert int(misled.rejected.sum()) >= int((~alone.broken).sum())


def test_a_search_is_tf32_on_a_gpu_unless_told_otherwise() -> None:
    assert [precision_on(device, None) for device in ("cuda", "cuda:1", "cpu")] == ["tf32", "tf32", "fp32"]
    assert [precision_on(device, "fp32") for device in ("cuda", "cpu")] == ["fp32", "fp32"]


def test_precisions_are_set_and_put_back() -> None:
    device = torch.device("cpu")
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, name)
    with search_precision(device, "tf32"):
        assert getattr(matmul, name) in ("tf32", True)
        with float32_set_to("ieee"):
            assert getattr(matmul, name) in ("ieee", False)
    with search_precision(device, "bf16"):
        assert torch.is_autocast_enabled("cpu")
        with search_precision(device, "fp32"):
            assert not torch.is_autocast_enabled("cpu")
    assert getattr(matmul, name) == before and not torch.is_autocast_enabled("cpu")
    with pytest.raises(ConfigError, match="fp64"), search_precision(device, "fp64"):  # type: ignore[arg-type]
        pass


def test_channels_last_and_compilation_change_nothing_but_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[nn.Module] = []

    def wrap(model: nn.Module) -> nn.Module:  # what compilation does to values is tested with the backward rules
        compiled.append(model)
        return nn.Sequential(model)

    monkeypatch.setattr(torch, "compile", wrap)
    few = ("apgd-ce", "bpda-apgd-ce")
    plain = run(tmp_path / "plain", attacks=few)
    fast = run(tmp_path / "fast", attacks=few, channels_last=True, compile=True)
    assert len(compiled) == 1
    for model in ("base", "sparsified"):
        assert (plain.first_broken_by(model) == fast.first_broken_by(model)).all()  # type: ignore[arg-type]
    worst = plain.comparison("worst case")
    assert 0 < worst.sparsified.fraction < 1
    run(tmp_path / "plain", attacks=few, channels_last=True)  # goes on from the same state
    with pytest.raises(ArtifactError, match="precision: fp32 -> bf16"):
        run(tmp_path / "plain", attacks=few, precision="bf16")


def test_the_report_says_which_attack_it_was_what_it_cost_and_who_broke_what(tmp_path: Path) -> None:
    evaluation = run(tmp_path)
    for model in ("base", "sparsified"):
        steps = evaluation.to_report()["attacks"][model]
        correct = int(evaluation.outcomes(model).correct.sum())  # type: ignore[arg-type]
        left = round(16 * evaluation.comparison("worst case").to_report()[f"{model}_accuracy"])
        assert sum(step["n_broken_that_nothing_before_had"] for step in steps) == correct - left
        for step in steps[:-1]:
            assert "version" in step["implementation"]
            robust, broken = step["passes_a_robust_example"], step["passes_a_broken_example"]
            if robust is not None:  # the clean image, the start and 100 steps; the last point needs no gradient
                n_forward = 1 + 2 * 101 if step["attack"].startswith("base-gradient") else 1 + 101
                assert (robust["forward"], robust["backward"]) == (n_forward, 100)
            if broken is not None:
                assert broken["forward"] < 100
            n_robust = step["n_faced"] - step["n_broken"]
            total = sum(
                n * (each or {"forward": 0})["forward"] for n, each in ((n_robust, robust), (step["n_broken"], broken))
            )
            assert total == pytest.approx(step["forward_passes"], abs=1)
