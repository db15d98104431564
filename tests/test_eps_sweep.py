"""Several budgets in one evaluation: what is broken stays broken, and is not attacked again."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from meansparse_cli.attacks.budget import within_budget
from meansparse_cli.attacks.problem import AttackResult, Budget, Problem
from meansparse_cli.data.examples import Examples
from meansparse_cli.engine import evaluate
from meansparse_cli.engine.cells import FoundImages
from meansparse_cli.engine.comparison import Evaluation, eps_rows, headline_eps
from meansparse_cli.engine.evaluate import EvaluationRun, Plan
from meansparse_cli.engine.state import StateFolder, eps_state_folder
from meansparse_cli.engine.witnesses import collect_adversarial
from meansparse_cli.errors import ConfigError
from meansparse_cli.operator.active import alpha_set
from meansparse_cli.operator.insertion import SparsifiedModel
from meansparse_cli.operator.module import MeanSparse
from meansparse_cli.reporting.curves import draw_eps_curve
from meansparse_cli.reporting.evaluation_tables import eps_table
from meansparse_cli.settings.resolve import resolve
from meansparse_cli.settings.stages import EvaluateConfig
from meansparse_cli.settings.values import eps_grid, parse_eps_grid

GRID = ("0.02", "0.05", "0.1")
ALL = ("apgd-ce", "square", "transfer")


def test_grids() -> None:
    assert eps_grid("8/255") == ("8/255",)
    assert eps_grid("8/255, 2/255,8/255") == ("2/255", "8/255")
    assert eps_grid("1/255:16/255:1/255") == tuple(f"{k}/255" for k in range(1, 17))
    assert eps_grid("0.25:1:0.25") == ("0.25", "0.5", "0.75", "1")
    assert parse_eps_grid(["1/255", 0.5]) == "1/255,0.5"
    assert resolve("evaluate", EvaluateConfig, None, {"eps": "2/255,8/255"})[0].eps == "2/255,8/255"
    for bad in ("", "0,1/255", "1/255:1", "2:1:1", "1:2:0", "a:b:c", "-1/255", "0:1:0.1", "1/255:1:1/100000"):
        with pytest.raises(ValueError, match="eps"):
            parse_eps_grid(bad)
        with pytest.raises(ConfigError):
            resolve("evaluate", EvaluateConfig, None, {"eps": bad})


def test_the_headline_is_the_data_sets_own_eps_or_the_largest() -> None:
    assert headline_eps(("4/255", "8/255", "16/255"), "cifar10", "Linf") == "8/255"
    assert headline_eps(("4/255", "16/255"), "cifar10", "Linf") == "16/255"
    assert headline_eps(("0.1",), "my-images", "L2") == "0.1"


def test_a_grid_and_a_single_eps_go_on_with_each_others_state(
    tmp_path: Path, calls: list[tuple[str, float, float, list[int]]]
) -> None:
    assert eps_state_folder(tmp_path, "0.05", ("0.05",)) == tmp_path
    assert eps_state_folder(tmp_path, "0.05", GRID) == tmp_path / "eps-0.05"
    sweep(tmp_path, ("0.05",))
    assert eps_state_folder(tmp_path, "0.05", GRID) == tmp_path  # begun there
    assert eps_state_folder(tmp_path, "0.1", GRID) == tmp_path / "eps-0.1"
    calls.clear()
    sweep(tmp_path, ("0.02", "0.05"))
    sweep(tmp_path, ("0.05", "0.1"))  # the last of one grid, the first of another
    assert 0.05 not in {eps for _, _, eps, _ in calls}
    at_01 = {(name, alpha, i) for name, alpha, eps, indices in calls if eps == 0.1 for i in indices}
    calls.clear()
    sweep(tmp_path, ("0.1",))  # now also what both models had fallen to before
    assert at_01 and calls and not at_01 & {(name, alpha, i) for name, alpha, _, indices in calls for i in indices}


class Threshold(SparsifiedModel):
    """Class 1 where the one pixel is above 0.5; the operator makes 0.5 of what lies within 0.025 of it, class 0."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), cast(Any, ["the only one"]))
        self.sparse = MeanSparse(torch.tensor([0.5]), torch.tensor([0.1]), 0.0, 1)

    def at(self, site: Any) -> nn.Module:
        return self.sparse

    def forward(self, x: Tensor) -> Tensor:
        value = self.sparse(x).flatten(1)
        return torch.cat([0.5 - value, value - 0.5], dim=1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, float, list[int]]]:
    """An attack that reaches eps, but fails on the examples of an odd index above eps 0.05."""
    made: list[tuple[str, float, float, list[int]]] = []

    def attack(name: str, problem: Problem, examples: Examples, alphas: Tensor, **rest: Any) -> AttackResult:
        model, budget, x, y, indices = problem.model, problem.budget, examples.x, examples.y, examples.indices
        made.append((name, float(alphas[0]), budget.eps, indices.tolist()))
        able = torch.ones_like(y, dtype=torch.bool) if budget.eps <= 0.05 else indices % 2 == 0
        away = torch.where(y == 1, -1.0, 1.0) * able
        moved = (x + 0.999 * budget.eps * away.view(-1, 1, 1, 1)).clamp(0, 1)
        with alpha_set(cast(SparsifiedModel, model), alphas):
            broken = model(moved).argmax(1) != y
        return AttackResult(moved, broken, torch.ones(len(x), 2).long(), 0 * indices, 0.0)

    monkeypatch.setattr(evaluate, "run_attack", attack)
    return made


def runs_of(folder: Path, grid: tuple[str, ...] = GRID) -> dict[str, EvaluationRun]:
    value = 0.3 + 0.4 * (torch.arange(60) * 0.6180339887 % 1.0)
    x, y, indices = value.view(-1, 1, 1, 1), (value > 0.5).long(), torch.arange(60)

    runs, smaller = dict[str, EvaluationRun](), None
    for eps in grid:
        state = StateFolder(eps_state_folder(folder, eps, grid))
        smaller = evaluation_of(Examples(x, y, indices), float(eps), ("apgd-ce", "square"), state, smaller)
        smaller.attack()
        runs[eps] = smaller
    return runs


def sweep(folder: Path, grid: tuple[str, ...] = GRID) -> dict[str, Evaluation]:
    return {eps: run.evaluation() for eps, run in runs_of(folder, grid).items()}


def evaluation_of(
    examples: Examples, eps: float, attacks: tuple[str, ...], state: StateFolder, smaller: EvaluationRun | None = None
) -> EvaluationRun:
    problem = Problem(Threshold(), Budget("Linf", eps), n_classes=2, seed=0, batch_size=16, precision="fp32")
    return EvaluationRun(problem, examples, Plan(attacks, 0.25), state, smaller=smaller)


def test_what_both_models_fell_to_is_not_attacked_again_and_what_is_broken_stays_so(
    tmp_path: Path, calls: list[tuple[str, float, float, list[int]]]
) -> None:
    found = sweep(tmp_path)
    left = {eps: found[eps].base.robust_to(ALL) | found[eps].sparsified.robust_to(ALL) for eps in GRID}  # type: ignore[operator]
    one_alone = 0
    for model, alpha in (("base", 0.0), ("sparsified", 0.25)):
        outcomes = {eps: found[eps].outcomes(model) for eps in GRID}  # type: ignore[arg-type]
        broken = {eps: outcomes[eps].broken["apgd-ce"] for eps in GRID}
        assert broken["0.02"].any() and (broken["0.05"] > broken["0.02"]).any()
        for small, large in zip(GRID, GRID[1:], strict=False):
            assert (broken[large] >= broken[small]).all()
            faced = [
                i
                for name, at, eps, indices in calls
                if (name, at, eps) == ("apgd-ce", alpha, float(large))
                for i in indices
            ]
            # where one model stands, the other is attacked afresh: its images of this eps are to be tried on that one
            spared = broken[small] & ~left[small]
            assert set(faced) == set((outcomes[large].correct & ~spared).nonzero()[0].tolist())
            one_alone += int((broken[small] & left[small]).sum())
        # the attack of eps 0.1 cannot do odd examples: those of eps 0.05 count all the same
        assert (broken["0.1"] & broken["0.05"] & (found["0.1"].indices % 2 == 1)).any()
    worst = [found[eps].comparison("worst case").sparsified.fraction for eps in GRID]
    assert worst == sorted(worst, reverse=True) and worst[-1] < worst[0]
    assert one_alone > 0


def test_a_second_run_attacks_nothing_and_a_finer_grid_only_what_is_new(
    tmp_path: Path, calls: list[tuple[str, float, float, list[int]]]
) -> None:
    first = sweep(tmp_path)
    calls.clear()
    again = sweep(tmp_path)
    assert calls == []
    assert eps_rows(again) == eps_rows(first)
    sweep(tmp_path, ("0.02", "0.03", "0.05", "0.1"))
    assert {eps for _, _, eps, _ in calls} == {0.03}


def test_every_broken_example_has_an_image_whatever_eps_it_was_broken_at(
    tmp_path: Path, calls: list[tuple[str, float, float, list[int]]]
) -> None:
    runs = list(runs_of(tmp_path).values())
    examples, budget = runs[-1].cells.examples, runs[-1].cells.problem.budget
    for name, found in collect_adversarial(runs).items():
        broken = runs[-1].models[name].correct & ~runs[-1].robust(name)
        assert len(found.indices) > 5 and torch.equal(found.indices, examples.indices[broken])
        assert within_budget(found.images, examples.x[broken], budget).all()
        rows = broken.nonzero().flatten()
        assert runs[-1].cells.breaks(FoundImages(rows, found.images), runs[-1].models[name].variant).all()


def test_rows_table_and_curve(tmp_path: Path, calls: list[tuple[str, float, float, list[int]]]) -> None:
    found = sweep(tmp_path / "state")
    rows = eps_rows(found)
    assert [row["eps"] for row in rows] == list(GRID)
    assert all(row["sparsified_accuracy"] <= row["sparsified_plain_attacks_accuracy"] for row in rows)
    results = found[GRID[0]].to_report() | {"eps_curve": rows}
    assert len(eps_table(results, with_clean=True).rows) == 4
    for name in ("a", "b"):
        draw_eps_curve(results, norm="Linf", title="t", png=tmp_path / f"{name}.png", svg=tmp_path / f"{name}.svg")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_another_evaluation_is_not_taken_over(tmp_path: Path, calls: list[tuple[str, float, float, list[int]]]) -> None:
    examples, others = (Examples(torch.rand(n, 1, 1, 1), torch.arange(n) % 2, torch.arange(n)) for n in (60, 2))
    smaller = evaluation_of(examples, 0.02, ("apgd-ce",), StateFolder(tmp_path / "a"))
    with pytest.raises(ConfigError, match="other examples"):
        evaluation_of(others, 0.05, ("apgd-ce",), StateFolder(tmp_path / "b"), smaller)
