"""``--find-eps``: the smallest eps that breaks an example, on a model where it is known in closed form."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner

from meansparse_cli.attacks.problem import Budget, Problem
from meansparse_cli.cli import app
from meansparse_cli.data.examples import Examples
from meansparse_cli.engine import distances
from meansparse_cli.engine.distances import NOWHERE, PARTS, Distances, distances_to_report
from meansparse_cli.operator.defence import defend
from tests.conftest import write_quick_network

EPS = 0.02
ATTACKS = ("apgd-margin-30", "bpda-apgd-ce-30")


class Brightness(nn.Module):
    """Class 1 where the mean pixel is above a half: an Linf attack has to go just as far as the mean is from it."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        above = self.front(x).flatten(1).mean(dim=1) - 0.5
        return torch.stack([-above, above], dim=1) * 10


MARGINS = torch.tensor([0.021, 0.031, 0.047, 0.079, 0.155, 0.3])


@pytest.fixture
def problem() -> Problem:
    return Problem(defend(Brightness(), {"front": None}), Budget("Linf", EPS), 2, 0, 4, "fp32")


@pytest.fixture
def examples() -> Examples:
    x = (0.5 + MARGINS).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return Examples(x, torch.ones(len(x), dtype=torch.int64), torch.arange(len(x)))


def levels_of(search: Distances, n: int, told: list[int] | None = None) -> list[int]:
    levels, inside = search.of("base", 0.0, torch.arange(n), (told if told is not None else []).append)
    assert not len(inside)
    return levels.tolist()  # type: ignore[no-any-return]


def test_the_answer_is_the_one_known(tmp_path: Path, problem: Problem, examples: Examples) -> None:
    told: list[int] = []
    levels = levels_of(Distances(problem, examples, ATTACKS, tmp_path, {}), len(examples), told)
    truth = torch.ceil(MARGINS / EPS * PARTS).long().tolist()
    assert truth[-1] > NOWHERE  # 15 budgets away
    assert all(true <= found <= true + 1 for found, true in zip(levels[:-1], truth[:-1], strict=True)), (levels, truth)
    assert levels[-1] == NOWHERE and sum(told) == len(examples)


def test_it_goes_on_batch_by_batch(
    tmp_path: Path, problem: Problem, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = levels_of(Distances(problem, examples, ATTACKS, tmp_path / "whole", {}), len(examples))
    calls, run_attack = [], distances.run_attack

    def killed(*words: Any, **more: Any) -> Any:
        calls.append(words)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return run_attack(*words, **more)

    search = Distances(problem, examples, ATTACKS, tmp_path / "killed", {})
    monkeypatch.setattr(distances, "run_attack", killed)
    with pytest.raises(KeyboardInterrupt):
        levels_of(search, len(examples))
    n_before = len(list((tmp_path / "killed").rglob("*.pt")))
    assert n_before == 1  # the first batch of four is kept
    assert levels_of(Distances(problem, examples, ATTACKS, tmp_path / "killed", {}), len(examples)) == whole


def test_what_falls_inside_the_budget_is_handed_over(tmp_path: Path, problem: Problem, examples: Examples) -> None:
    inside_budget = Examples(examples.x - 0.011, examples.y, examples.indices)  # the first margin is now half of eps
    levels, found = Distances(problem, inside_budget, ATTACKS, tmp_path, {}).of(
        "base", 0.0, torch.arange(len(examples)), lambda n: None
    )
    assert levels[0] in (4, 5) and found.rows.tolist() == [0]
    assert (found.images - inside_budget.x[:1]).abs().max() <= EPS


def test_no_budget_is_larger_than_the_range_of_pixels(tmp_path: Path, examples: Examples) -> None:
    wide = Problem(defend(Brightness(), {"front": None}), Budget("Linf", 0.2), 2, 0, 4, "fp32")
    last = examples.at(torch.tensor([5]))
    assert Distances(wide, last, ATTACKS, tmp_path, {}).most == 40  # an eps of 1
    assert levels_of(Distances(wide, last, ATTACKS, tmp_path, {}), 1)[0] in (12, 13)


def test_the_report_of_nothing_robust() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    report = distances_to_report({"base": (none, none)}, EPS, 64)
    assert report["base"] == {"n_robust": 0, "n_beyond": 0, "quantiles": {}}


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*write_quick_network(tmp_path), "--run", "r", "--n-examples"]
    for line in (["fetch", *words[:-1]], ["calibrate", *words, "60"]):
        assert CliRunner().invoke(app, line).exit_code == 0
    attacks = [word for name in ATTACKS for word in ("--attack", name)]
    line = ["evaluate", *words, "10", "--eps", "0.06", "--alpha", "0.3", "--find-eps", "--no-doubts", *attacks]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0, result.output
    assert "Smallest eps that breaks an example" in result.stderr
    report = yaml.safe_load(Path("r/evaluate.yaml").read_text())
    found, arrays = report["results"]["distances"], np.load("r/distances.npz")
    worst = report["results"]["comparisons"][-1]
    for model in ("base", "sparsified"):
        assert found[model]["n_robust"] == np.isfinite(arrays[model]).sum() == round(10 * worst[f"{model}_accuracy"])
        assert found[model]["quantiles"]["50"] > report["results"]["distances"]["budget"]
    page = CliRunner().invoke(app, ["report", "r", "--format", "html"])
    assert page.exit_code == 0 and "beyond the budget" in page.stdout
    more = CliRunner().invoke(app, ["11" if word == "10" else word for word in line])  # what is known is kept
    assert more.exit_code == 0, more.output
