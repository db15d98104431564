"""The evaluation: known answers on a model with a known boundary, and a state that survives SIGKILL."""

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from meansparse_cli import files as artifacts
from meansparse_cli import ledger
from meansparse_cli.attacks import PRESETS
from meansparse_cli.attacks.problem import AttackResult, Budget, Norm, Problem
from meansparse_cli.data.examples import Examples
from meansparse_cli.engine import cells, evaluate, state
from meansparse_cli.engine.cells import FoundImages
from meansparse_cli.engine.comparison import Evaluation
from meansparse_cli.engine.evaluate import EvaluationProgress, EvaluationRun, Plan
from meansparse_cli.engine.outcomes import MODELS, attack_groups, run_order
from meansparse_cli.engine.state import StateFolder
from meansparse_cli.engine.witnesses import collect_adversarial
from meansparse_cli.errors import ArtifactError, ConfigError, DataError
from meansparse_cli.operator.active import alpha_set
from meansparse_cli.operator.insertion import SparsifiedModel
from meansparse_cli.operator.module import MeanSparse

EPS = 0.05
ALPHA = 0.5  # with a standard deviation of 0.1: values within 0.05 of 0.5 become 0.5, which is class 0


@dataclass(frozen=True)
class Settings:
    attacks: tuple[str, ...] = ("apgd-ce", "square", "bpda-apgd-ce")
    norm: Norm = "Linf"
    eps: float = EPS
    seed: int = 0
    batch_size: int = 16
    individual: bool = False


SETTINGS = Settings()


class Threshold(SparsifiedModel):
    """Class 1 where the one pixel, after the operator, is above 0.5; else class 0."""

    def __init__(self) -> None:
        super().__init__(nn.Identity(), cast(Any, ["the only one"]))
        self.sparse = MeanSparse(torch.tensor([0.5]), torch.tensor([0.1]), 0.0, 1)

    def at(self, site: Any) -> nn.Module:
        return self.sparse

    def forward(self, x: Tensor) -> Tensor:
        value = self.sparse(x).flatten(1)
        return torch.cat([0.5 - value, value - 0.5], dim=1)


@dataclass
class FakeAttacks:
    """``run_attack`` with a reach of its own for each attack, in parts of eps, and a record of whom it faced."""

    reach: dict[str, float] = field(default_factory=lambda: {"apgd-ce": 0.5, "square": 1.0, "bpda-apgd-ce": 1.0})
    lies: set[str] = field(default_factory=set)
    calls: list[tuple[str, float, list[int]]] = field(default_factory=list)

    def __call__(
        self, name: str, problem: Problem, examples: Examples, alphas: Tensor, *, on_progress: Callable[[int], None]
    ) -> AttackResult:
        budget, x, y, indices = problem.budget, examples.x, examples.y, examples.indices
        self.calls.append((name, float(alphas[0]), indices.tolist()))
        away = torch.where(y == 1, -1.0, 1.0).view(-1, 1, 1, 1)
        moved = (x + away * (self.reach[name] * budget.eps * 0.999)).clamp(0, 1)
        with alpha_set(cast(SparsifiedModel, problem.model), alphas):
            broken = problem.model(moved).argmax(dim=1) != y
        if name in self.lies:
            broken = torch.ones_like(broken)
        on_progress(len(x))
        adversarial = torch.where(broken.view(-1, 1, 1, 1), moved, x)
        # an example's cost tells one from another, and claims are rejected where it is odd
        passes = torch.stack([2 + indices % 7, indices % 5], dim=1)
        return AttackResult(adversarial, broken, passes, indices % 2, 0.5)

    def faced(self, name: str, alpha: float) -> list[int]:
        return [index for called, at, indices in self.calls if (called, at) == (name, alpha) for index in indices]


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch) -> FakeAttacks:
    fake = FakeAttacks()
    monkeypatch.setattr(evaluate, "run_attack", fake)
    return fake


def examples(n: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels spread over [0.3, 0.7], in an order that mixes them; the first 40 are the same for every n."""
    value = 0.3 + 0.4 * (torch.arange(1000) * 0.6180339887 % 1.0)[:n]
    return value.view(-1, 1, 1, 1), (value > 0.5).long(), 1000 + torch.arange(n)


def begin(
    folder: Path, settings: Settings = SETTINGS, *, alpha: float = ALPHA, n: int = 40, **others: Any
) -> EvaluationRun:
    x, y, indices = others.pop("examples", None) or examples(n)
    fingerprint = others.pop("fingerprint", {"weights": "w1", "statistics": "s1"})
    problem = Problem(
        others.pop("model", None) or Threshold(),
        Budget(settings.norm, settings.eps),
        n_classes=2,
        seed=settings.seed,
        batch_size=settings.batch_size,
        precision="fp32",
    )
    plan = Plan(settings.attacks, alpha, settings.individual)
    return EvaluationRun(problem, Examples(x, y, indices), plan, StateFolder(folder, fingerprint), **others)


def run(folder: Path, settings: Settings = SETTINGS, **others: Any) -> Evaluation:
    return begin(folder, settings, **others).attack()


def content(evaluation: Evaluation, file: Path) -> tuple[bytes, dict[str, Any]]:
    """What must be equal between equal evaluations: the outcome file, and the report without its clock."""
    file.write_bytes(evaluation.outcomes_npz())
    return file.read_bytes(), {key: value for key, value in evaluation.to_report().items() if key != "seconds"}


# ---- the numbers


def test_the_outcomes_are_those_of_the_known_boundary(tmp_path: Path, attacks: FakeAttacks) -> None:
    evaluation = run(tmp_path)
    value = examples()[0].flatten().numpy()
    right = value > 0.5
    # base: class 1 above 0.5. Sparsified: the band of 0.05 around 0.5 is class 0 as well.
    boundary = {"base": 0.5, "sparsified": 0.55}
    for model in MODELS:
        correct = (value > boundary[model]) == right
        margin = np.abs(value - boundary[model])
        outcomes = evaluation.outcomes(model)
        assert (outcomes.correct == correct).all()
        assert (outcomes.robust_to(["apgd-ce"]) == correct & (margin > 0.5 * EPS)).all()
        assert (outcomes.robust_to(["apgd-ce", "square"]) == correct & (margin > EPS)).all()
    # base images reach 0.05 to either side of 0.5, so they pull a class-1 example at 0.55 .. into the band, no further
    clean = evaluation.comparison("clean")
    assert clean.base.fraction == 1.0
    assert clean.gain.lost == int(((value > 0.5) & (value <= 0.55)).sum())


def test_an_attack_faces_what_the_ones_before_have_left(tmp_path: Path, attacks: FakeAttacks) -> None:
    evaluation = run(tmp_path)
    for model, alpha in (("base", 0.0), ("sparsified", ALPHA)):
        outcomes = evaluation.base if model == "base" else evaluation.sparsified
        indices = evaluation.indices
        assert attacks.faced("apgd-ce", alpha) == indices[outcomes.correct].tolist()
        assert attacks.faced("square", alpha) == indices[outcomes.robust_to(["apgd-ce"])].tolist()
    robust = [step.robust.fraction for step in evaluation.steps("sparsified")]
    assert robust == sorted(robust, reverse=True)
    worst = evaluation.comparison("worst case")
    assert robust[-1] == worst.sparsified.fraction
    assert all(worst.sparsified.fraction <= other.sparsified.fraction for other in evaluation.comparisons)


def test_individual_gives_each_attack_a_number_of_its_own(tmp_path: Path, attacks: FakeAttacks) -> None:
    cascade = run(tmp_path / "cascade")
    assert "square" not in [found.name for found in cascade.comparisons]
    alone = run(tmp_path / "individual", replace(SETTINGS, individual=True))
    names = [found.name for found in alone.comparisons]
    assert names == ["clean", "apgd-ce", "square", "plain attacks", "bpda-apgd-ce", "bpda", "transfer", "worst case"]
    for name in ("clean", "apgd-ce", "plain attacks", "worst case"):
        assert cascade.comparison(name) == alone.comparison(name)


def test_both_models_face_the_same_attacks(tmp_path: Path, attacks: FakeAttacks) -> None:
    evaluation = run(tmp_path, replace(SETTINGS, individual=True))
    for attack in evaluation.attacks:
        assert attacks.faced(attack, 0.0) != []
        assert attacks.faced(attack, ALPHA) != []
    assert all(step.spent.forward_passes for step in evaluation.steps("base") if step.attack != "transfer")


def test_images_found_on_one_model_are_tried_on_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # one attack, helpless against the sparsified model, strong against the base model
    class Masked(FakeAttacks):
        def __call__(
            self, name: str, problem: Problem, examples: Examples, alphas: Tensor, **rest: Any
        ) -> AttackResult:
            self.reach[name] = 1.0 if float(alphas[0]) == 0 else 0.0
            return super().__call__(name, problem, examples, alphas, **rest)

    monkeypatch.setattr(evaluate, "run_attack", Masked())
    evaluation = run(tmp_path, replace(SETTINGS, attacks=("apgd-ce",)), alpha=0.2)
    value = examples()[0].flatten().numpy()
    pulled_back = (value > 0.52) & (value <= 0.55)  # broken on the base model by an image at 0.47 .. 0.50
    assert (evaluation.sparsified.broken["transfer"] >= pulled_back).all()
    assert evaluation.sparsified.broken["transfer"].any()
    plain, worst = evaluation.comparison("plain attacks"), evaluation.comparison("worst case")
    assert plain.sparsified.fraction > worst.sparsified.fraction
    assert evaluation.counts()["first_broken_by_transfer"]["sparsified"] > 0


@pytest.mark.parametrize("fault", ["still right", "outside the budget", "outside [0, 1]", "not a number"])
def test_a_break_that_does_not_hold_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def lying(name: str, problem: Problem, examples: Examples, alphas: Tensor, **rest: Any) -> AttackResult:
        x, indices = examples.x, examples.indices
        images = {
            "still right": x,
            "outside the budget": 1 - x,
            "outside [0, 1]": x - 10,
            "not a number": x * float("nan"),
        }[fault]
        return AttackResult(
            images, torch.ones(len(x), dtype=torch.bool), torch.zeros(len(x), 2).long(), 0 * indices, 0.0
        )

    monkeypatch.setattr(evaluate, "run_attack", lying)
    for _ in range(3):  # what an earlier session kept is judged as it is read back
        evaluation = run(tmp_path, replace(SETTINGS, attacks=("apgd-ce", "square")))
    far = np.abs(examples()[0].flatten().numpy() - 0.5) > EPS + 1e-6
    worst = evaluation.sparsified.robust_to(evaluation.attacks)
    assert worst is not None
    assert (worst == evaluation.sparsified.correct)[far].all()
    for step in evaluation.steps("sparsified")[:2]:  # both attacks faced all of them: a lie stops nobody else
        assert step.n_faced == evaluation.sparsified.correct.sum()
        assert step.spent.unconfirmed >= far.sum()
    assert evaluation.counts()["breaks_unconfirmed"]["base"] > 0


def test_the_report_is_plain_fractions_and_the_outcomes_can_be_read_back(tmp_path: Path, attacks: FakeAttacks) -> None:
    evaluation = run(tmp_path)
    report = evaluation.to_report()
    assert yaml.safe_load(yaml.safe_dump(report)) == report
    for row in report["comparisons"]:
        assert 0 <= row["base_accuracy"] <= 1
        assert 0 <= row["sparsified_accuracy"] <= 1
    assert report["comparisons"][0]["name"] == "clean"
    assert report["comparisons"][-1]["name"] == "worst case"
    assert report["attacks"]["sparsified"][0]["rejected"] == int(
        (evaluation.indices[evaluation.sparsified.correct] % 2).sum()
    )
    (tmp_path / "outcomes.npz").write_bytes(evaluation.outcomes_npz())
    with np.load(tmp_path / "outcomes.npz") as saved:
        names = saved["name"].tolist()
        assert names == ["clean", "apgd-ce", "square", "bpda-apgd-ce", "transfer"]
        robust = saved["sparsified_first_broken_by"] == -1
        assert robust.mean() == pytest.approx(report["comparisons"][-1]["sparsified_accuracy"])
        assert (robust == (saved["sparsified_outcome"] != 1).all(axis=1)).all()
        assert saved["index"].tolist() == list(range(1000, 1040))


def test_alpha_zero_makes_no_difference(tmp_path: Path, attacks: FakeAttacks) -> None:
    evaluation = run(tmp_path, alpha=0.0)
    assert len(attacks.faced("apgd-ce", 0.0)) == 40  # once, not once a model
    assert [step.n_broken for step in evaluation.steps("sparsified")] == [
        step.n_broken for step in evaluation.steps("base")
    ]
    assert all(found.gain.gained == found.gain.lost == 0 for found in evaluation.comparisons)
    assert evaluation.verdict.name == "no difference"
    assert "the two models are one" in evaluation.verdict.reason


def test_the_model_is_left_as_it_was(tmp_path: Path, attacks: FakeAttacks) -> None:
    model = Threshold().train()
    model.sparse.set_alpha(0.25)
    run(tmp_path, model=model)
    assert model.training
    assert float(model.sparse.alpha) == 0.25
    assert not model.sparse.straight_through


def test_the_order_puts_autoattack_first_and_bpda_last() -> None:
    order = run_order(["pgd-50", "apgd-ce", "bpda-apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"])
    assert order == ("apgd-ce", "apgd-t", "fab-t", "square", "pgd-50", "apgd-dlr", "bpda-apgd-ce")
    groups = attack_groups(order)
    assert groups["autoattack"] == order[:4]
    assert groups["plain attacks"] == order[:6]
    assert groups["worst case"] == (*order, "transfer")


def test_progress_adds_up(tmp_path: Path, attacks: FakeAttacks) -> None:
    updates: list[EvaluationProgress] = []
    evaluation = run(tmp_path, on_update=updates.append)
    assert all(update.n_done <= update.n_total and update.n_examples == 40 for update in updates)
    last = updates[-1]
    assert last.n_done == last.n_total
    for model in MODELS:
        expected = [round(step.robust.fraction * 40) for step in evaluation.steps(model)[:-1]]
        assert list(last.n_robust[model].values())[1:] == expected
    again: list[EvaluationProgress] = []
    run(tmp_path, on_update=again.append)
    assert again[-1].n_resumed == again[-1].n_total


def test_each_break_is_judged_once(tmp_path: Path, attacks: FakeAttacks, monkeypatch: pytest.MonkeyPatch) -> None:
    judge, n_judged = cells.judge, 0

    def counting(problem: Problem, images: Tensor, *others: Tensor) -> Tensor:
        nonlocal n_judged
        n_judged += len(images)
        return judge(problem, images, *others)

    monkeypatch.setattr(cells, "judge", counting)
    fresh = begin(tmp_path)
    evaluation = fresh.attack()
    n_found = sum(step.n_broken for model in MODELS for step in evaluation.steps(model) if step.attack != "transfer")
    assert n_found > 10
    assert n_judged == 2 * 40 + n_found  # clean images; what attacks found they have judged: on the other model alone

    n_judged, resumed = 0, begin(tmp_path)
    assert content(resumed.attack(), tmp_path / "a.npz") == content(evaluation, tmp_path / "b.npz")
    assert n_judged == 2 * n_found  # read back: on its own model and on the other one

    n_judged = 0
    resumed.try_pool({"elsewhere": FoundImages(torch.arange(3), examples(3)[0])})
    assert n_judged == 2 * 3
    collected = collect_adversarial([resumed])
    assert [len(collected[model].images) for model in MODELS] == [
        int((resumed.models[model].correct & ~resumed.robust(model)).sum()) for model in MODELS
    ]
    assert n_judged == 2 * 3


# ---- what is on disk


def test_a_finished_evaluation_runs_nothing_again(tmp_path: Path, attacks: FakeAttacks) -> None:
    first = content(run(tmp_path / "state"), tmp_path / "a.npz")
    attacks.calls.clear()
    assert content(run(tmp_path / "state"), tmp_path / "b.npz") == first
    assert attacks.calls == []


def test_more_examples_attack_only_the_new_ones(tmp_path: Path, attacks: FakeAttacks) -> None:
    run(tmp_path / "grown", n=20)  # ends inside a chunk
    attacks.calls.clear()
    grown = run(tmp_path / "grown", n=40)
    assert all(index >= 1020 for _, _, indices in attacks.calls for index in indices)
    assert content(grown, tmp_path / "a.npz") == content(run(tmp_path / "once", n=40), tmp_path / "b.npz")


def test_fewer_examples_are_the_first_ones(tmp_path: Path, attacks: FakeAttacks) -> None:
    run(tmp_path / "large", n=40)
    attacks.calls.clear()
    fewer = content(run(tmp_path / "large", n=21), tmp_path / "a.npz")  # their outcomes and what they cost
    assert attacks.calls == []
    assert fewer == content(run(tmp_path / "small", n=21), tmp_path / "b.npz")


def test_a_further_attack_may_join_and_one_may_leave(tmp_path: Path, attacks: FakeAttacks) -> None:
    run(tmp_path / "grown", replace(SETTINGS, attacks=("square",)))
    grown = content(run(tmp_path / "grown"), tmp_path / "a.npz")
    assert grown == content(run(tmp_path / "once"), tmp_path / "b.npz")
    run(tmp_path / "once", replace(SETTINGS, attacks=("apgd-ce",)))


@pytest.mark.parametrize(
    ("settings", "others", "words"),
    [
        ({"eps": 0.06}, {}, "eps: 0.05 -> 0.06"),
        ({"norm": "L2"}, {}, "norm: Linf -> L2"),
        ({"seed": 1}, {}, "seed: 0 -> 1"),
        ({}, {"alpha": 0.6}, "alpha: 0.5 -> 0.6"),
        ({}, {"fingerprint": {"weights": "w2", "statistics": "s1"}}, "weights: w1 -> w2"),
        ({}, {"fingerprint": {"weights": "w1"}}, "statistics: s1 -> None"),
        (
            {},
            {"fingerprint": {"weights": "w1", "statistics": "a" * 400}},
            f"statistics: s1 -> {'a' * 12}... (abd5e54b)",
        ),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, attacks: FakeAttacks, settings: dict[str, Any], others: dict[str, Any], words: str
) -> None:
    run(tmp_path)
    attacks.calls.clear()
    with pytest.raises(ArtifactError, match="other settings") as refusal:
        run(tmp_path, replace(SETTINGS, **settings), **others)
    assert words in refusal.value.message
    assert "--fresh" in str(refusal.value.hint)
    assert "--name" in str(refusal.value.hint)
    assert attacks.calls == []


def test_another_batch_size_is_not_another_evaluation(tmp_path: Path, attacks: FakeAttacks) -> None:
    first = run(tmp_path / "state", n=20)
    again = run(tmp_path / "state", replace(SETTINGS, batch_size=7), n=20)
    assert content(first, tmp_path / "a.npz") == content(again, tmp_path / "b.npz")
    run(tmp_path / "state", replace(SETTINGS, individual=True))


def test_chunks_are_full_whatever_was_broken_before(tmp_path: Path, attacks: FakeAttacks) -> None:
    run(tmp_path)
    sizes = [len(indices) for name, alpha, indices in attacks.calls if (name, alpha) == ("square", ALPHA)]
    assert sizes[:-1] == [16] * (len(sizes) - 1)
    assert sum(sizes) < 40


def test_an_attack_that_has_changed_is_refused(
    tmp_path: Path, attacks: FakeAttacks, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    monkeypatch.setattr(state, "attack_version", lambda attack: f"{attack}, twice as long")
    with pytest.raises(ArtifactError, match=r"attack apgd-ce: .* -> apgd-ce, twice as long"):
        run(tmp_path)


def test_outcomes_without_their_settings_are_refused(tmp_path: Path, attacks: FakeAttacks) -> None:
    run(tmp_path)
    (tmp_path / "settings.json").unlink()
    run(tmp_path)
    assert (tmp_path / "settings.json").exists()  # put back from its copy
    for name in ("settings.json", "settings.json.copy"):
        (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match=r"outcomes and no settings\.json"):
        run(tmp_path, replace(SETTINGS, eps=0.06))


def test_without_a_plain_attack_there_is_no_plain_number(tmp_path: Path, attacks: FakeAttacks) -> None:
    evaluation = run(tmp_path, replace(SETTINGS, attacks=("bpda-apgd-ce",)))
    assert [found.name for found in evaluation.comparisons] == [
        "clean",
        "bpda-apgd-ce",
        "bpda",
        "transfer",
        "worst case",
    ]
    # a clean gain that falls to BPDA is not masking of a plain attack that nobody ran
    assert evaluation.verdict.name == "inconclusive" and "plain" not in evaluation.verdict.reason


@pytest.mark.parametrize("change", ["pixels", "labels", "indices"])
def test_other_examples_are_refused(tmp_path: Path, attacks: FakeAttacks, change: str) -> None:
    run(tmp_path)
    x, y, indices = examples()
    part = {"pixels": x, "labels": y, "indices": indices}[change]
    part[17] = 0
    assert (part != dict(zip(("pixels", "labels", "indices"), examples(), strict=True))[change]).any()
    with pytest.raises(ArtifactError, match="1 of 40 are not the same"):
        run(tmp_path, examples=(x, y, indices))


def test_a_damaged_file_is_named_and_done_again_alone(
    tmp_path: Path, attacks: FakeAttacks, caplog: pytest.LogCaptureFixture
) -> None:
    first = content(run(tmp_path / "s"), tmp_path / "a.npz")
    chunk = tmp_path / "s" / "sparsified" / "square" / "000001.pt"
    positions = torch.load(chunk)["positions"].tolist()
    chunk.write_bytes(chunk.read_bytes()[:-40])
    attacks.calls.clear()
    assert content(run(tmp_path / "s"), tmp_path / "b.npz") == first
    assert attacks.calls == [("square", ALPHA, [1000 + position for position in positions])]
    assert "000001.pt is damaged" in caplog.text
    torch.save({"positions": torch.arange(3)}, tmp_path / "s" / "base" / "square" / "000009.pt")
    with pytest.raises(ArtifactError, match=r"000009\.pt is not a chunk") as refusal:
        run(tmp_path / "s")
    assert "delete it" in str(refusal.value.hint)
    (tmp_path / "s" / "base" / "square" / "000009.pt").unlink()
    (tmp_path / "s" / "settings.json").write_text("{")
    run(tmp_path / "s")  # put back from its copy
    for name in ("settings.json", "settings.json.copy"):
        (tmp_path / "s" / name).write_text("{")
    with pytest.raises(ArtifactError, match=r"settings\.json cannot be read"):
        run(tmp_path / "s")


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path: Path, attacks: FakeAttacks) -> None:
    with pytest.raises(ConfigError, match="unknown attack 'apgd-cee'"):
        run(tmp_path / "s", replace(SETTINGS, attacks=("apgd-cee",)))
    with pytest.raises(DataError, match="40 images, 50 labels and 50 indices"):
        run(tmp_path / "s", examples=(examples(40)[0], *examples(50)[1:]))
    with pytest.raises(ConfigError, match="must be 1 or above"):
        run(tmp_path / "s", n=0)
    assert not (tmp_path / "s").exists()


def test_interrupted_at_any_write_it_ends_the_same(
    tmp_path: Path, attacks: FakeAttacks, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = content(run(tmp_path / "whole"), tmp_path / "whole.npz")
    n_calls, save, n_writes, n_interruptions = len(attacks.calls), artifacts.save_torch, 0, 0

    def stop_at(k: int) -> Any:
        def counted_save(target: Path, state: dict[str, Any]) -> None:
            nonlocal n_writes
            n_writes += 1
            if n_writes == k:
                raise KeyboardInterrupt
            save(target, state)

        return counted_save

    for k in range(1, 100):
        folder, n_writes = tmp_path / f"cut-{k}", 0
        attacks.calls.clear()
        monkeypatch.setattr(ledger, "save_torch", stop_at(k))
        try:
            run(folder)
            break
        except KeyboardInterrupt:
            n_interruptions += 1
        finally:
            monkeypatch.setattr(ledger, "save_torch", save)
        assert content(run(folder), tmp_path / "cut.npz") == expected
        assert len(attacks.calls) <= n_calls + 1  # the chunk in flight, no more
    assert n_interruptions == 1 + 6 + n_calls  # example ids, clean chunks of two models, chunks of attacks


def test_fast_on_two_classes_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And without operators an attack through another backward rule, which is the same there, is not run again."""
    real, calls, stop_at = evaluate.run_attack, [], 0

    def counted(name: str, problem: Problem, given: Examples, alphas: Tensor, **others: Any) -> AttackResult:
        calls.append((name, float(alphas[0])))
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return real(name, problem, given, alphas, **others)

    monkeypatch.setattr(evaluate, "run_attack", counted)
    fast = replace(SETTINGS, attacks=PRESETS["fast"], batch_size=8)
    whole = run(tmp_path / "whole", fast)
    n_calls, stop_at = len(calls), len(calls) // 2
    named = {name for name, alpha in calls if alpha == 0}
    assert "apgd-margin-30" in named and "soft-0.05to0.005-apgd-margin-30" not in named
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", fast)
    n_done, stop_at = stop_at - 1, 0
    calls.clear()
    assert content(run(tmp_path / "cut", fast), tmp_path / "a.npz") == content(whole, tmp_path / "b.npz")
    assert len(calls) == n_calls - n_done
    value, label, _ = examples()
    away = (value.flatten() - 0.5).abs() > EPS
    assert np.array_equal(whole.base.robust_to(whole.attacks), away.numpy())  # the boundary at 0.5 is known
    assert len(run(tmp_path / "one", fast, n=1).labels) == 1


SCRIPT = '''
"""A small random network under real attacks; with a second argument, it hangs in the attack of that number."""
import sys, time
from pathlib import Path
import torch
from torch import nn
from meansparse_cli.attacks.problem import Problem
from meansparse_cli.attacks.problem import Budget
from meansparse_cli.data.examples import Examples
from meansparse_cli.engine import evaluate, state
from meansparse_cli.engine.evaluate import Plan, EvaluationRun
from meansparse_cli.engine.state import StateFolder
from meansparse_cli.operator.insertion import SparsifiedModel
from meansparse_cli.operator.module import MeanSparse

class Net(SparsifiedModel):
    def __init__(self):
        super().__init__(nn.Identity(), ["the only one"])
        self.first, self.last = nn.Linear(16, 12), nn.Linear(12, 4)
        self.sparse = MeanSparse(torch.zeros(12), torch.full((12,), 0.5), 0.0, 1)
    def at(self, site):
        return self.sparse
    def forward(self, x):
        return self.last(torch.relu(self.sparse(self.first(x.flatten(1)))))

def run(folder, hang_at=None):
    torch.manual_seed(0)
    model = Net()
    x = torch.rand(48, 1, 4, 4)
    model.last.bias.data -= model(x).mean(0)
    y = model(x).argmax(1)
    real, n_calls = evaluate.run_attack, 0
    def run_attack(*args, **kwargs):
        nonlocal n_calls
        n_calls += 1
        if n_calls == hang_at:
            print("hanging", flush=True)
            time.sleep(600)
        return real(*args, **kwargs)
    evaluate.run_attack = run_attack
    try:
        problem = Problem(model, Budget("Linf", 0.05), n_classes=4, seed=0, batch_size=16, precision="fp32")
        plan, state = Plan(("apgd-ce", "bpda-apgd-ce"), 0.5), StateFolder(Path(folder))
        return EvaluationRun(problem, Examples(x, y, torch.arange(48)), plan, state).attack(), n_calls
    finally:
        evaluate.run_attack = real

if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], int(sys.argv[2]))
'''


def test_killed_in_an_attack_and_run_again_it_ends_the_same(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    spec = importlib.util.spec_from_file_location("killed_evaluation", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    killed = tmp_path / "killed"
    with subprocess.Popen([sys.executable, script, killed, "5"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hanging\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(list(killed.glob("*/apgd-ce/*.pt"))) == 4  # every chunk that was done, and nothing half done

    resumed, n_resumed_calls = module.run(killed)
    whole, n_calls = module.run(tmp_path / "whole")
    assert n_resumed_calls == n_calls - 4
    assert content(resumed, tmp_path / "a.npz") == content(whole, tmp_path / "b.npz")
    assert 0 < whole.comparison("worst case").sparsified.fraction < whole.comparison("clean").sparsified.fraction
    for file in (tmp_path / "whole").rglob("*.pt"):
        mine = torch.load(killed / file.relative_to(tmp_path / "whole"), weights_only=True)
        for key, value in torch.load(file, weights_only=True).items():
            if isinstance(value, Tensor):
                assert torch.equal(mine[key], value)
    assert json.loads((killed / "settings.json").read_text())["attacks"].keys() == {"apgd-ce", "bpda-apgd-ce"}
