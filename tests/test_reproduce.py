"""``meansparse reproduce``: its chains make every cell of the paper's tables, in an order that can be run."""

import signal
import subprocess
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from meansparse_cli.cli import app
from meansparse_cli.errors import ConfigError
from meansparse_cli.paper.plan import FIGURE, Step, plan
from meansparse_cli.paper.results import attacks_of
from meansparse_cli.paper.tables import Cell, paper_table, table_names
from meansparse_cli.settings.arguments import Reproduce
from meansparse_cli.settings.values import eps_grid, parse_alphas
from meansparse_cli.stages import reproduce as stage
from meansparse_cli.stages.reproduce import CommandFailed, _Runner
from tests.conftest import said

MEASURED = [name for name in table_names() if name != "subset"]


def meansparse(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def given(step: Step) -> dict[str, list[str]]:
    """The options of a command, each with its values."""
    words, found = list(step.words), dict[str, list[str]]()
    for word, value in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            found.setdefault(word, []).append(value)
    return found


def makes(step: Step, cell: Cell) -> bool:
    """Is a result of this command one that can stand in the cell?"""
    options, where = given(step), cell.where
    one = {"--norm": "norm", "--centre": "centre", "--split": "split"}
    default = {"--centre": "channel-mean", "--split": "test"}
    if any(options.get(name, [default.get(name, where[key])]) != [where[key]] for name, key in one.items()):
        return False
    eps = [Fraction(each) for text in options.get("--eps", [where["eps"]]) for each in eps_grid(text)]
    alphas = [0.0, *parse_alphas((options.get("--alphas") or options["--alpha"])[0])]
    attacks = frozenset().union(*(attacks_of(name) for name in options["--attack"]))
    if (
        Fraction(where["eps"]) not in eps
        or float(where["alpha"]) not in alphas
        or not attacks_of(where["attack"]) <= attacks
    ):
        return False
    rules = {rule.split(":")[0] for rule in options.get("--sites", ["all"])}
    return float(where["alpha"]) == 0 or where["sites"].split(":")[0] in rules


@pytest.mark.parametrize("name", MEASURED)
def test_every_cell_is_made_by_a_command(name: str) -> None:
    steps = [step for step in plan(Reproduce(tables=[name])) if step.words[0] in ("measure", "evaluate")]
    attacked = [step for step in steps if given(step)["--attack"] != ["none"]]
    for column in paper_table(name).columns:
        for cell in column.cells:
            of_model = [
                step for step in attacked if column.config is None or f"configs/{column.config}.yaml" in step.words
            ]
            assert any(makes(step, cell) for step in of_model), cell


@pytest.mark.parametrize("name", [name for name in MEASURED if not paper_table(name).in_place_of])
def test_quick_makes_what_the_claims_need(name: str) -> None:
    table = paper_table(name)
    steps = [step for step in plan(Reproduce(tables=[name], quick=True, model="digits")) if "--attack" in step.words]
    for claim in table.claims:
        for place in claim.terms if claim.measure != "clean" else ():
            assert any(makes(step, table.cell(*place)) for step in steps if given(step)["--attack"] != ["none"]), claim


@pytest.mark.parametrize("name", [*table_names(), FIGURE])
@pytest.mark.parametrize("model", [None, "digits"])
def test_every_command_comes_after_those_it_needs(name: str, model: str | None, tmp_path: Path) -> None:
    steps = plan(Reproduce(tables=[name], model=model, models_dir=tmp_path))
    assert all(steps.index(before) < i for i, step in enumerate(steps) for before in step.after)
    assert steps[-1].words[0] == ("plot" if name == FIGURE else "table")
    reached = {steps[-1]}
    for step in reversed(steps):
        if step in reached:
            reached.update(step.after)
    assert reached == set(steps), "nothing is run in vain"


def test_the_subset_table_at_the_published_alpha() -> None:
    config = Reproduce(tables=["subset"], headline_config=Path("configs/cifar10-l2-wrn-70-16.yaml"), data_dir=("D",))
    calibrate, measure, *_, table = plan(config)
    run = "runs/tables/cifar10-l2-wrn-70-16-part-0.1"
    assert given(calibrate)["--fraction"] == ["0.1"] and given(calibrate)["--run"] == given(measure)["--run"] == [run]
    assert not {"--alphas", "--eps", "--norm"} & set(measure.words), "the configuration says them"
    assert len([word for word in table.words if "-part-" in word]) == 5
    assert given(plan(Reproduce(tables=["subset"]))[1])["--alphas"] == ["0.2"]


def test_a_data_set_can_have_a_folder_of_its_own() -> None:
    steps = plan(Reproduce(tables=["12"], data_dir=("A", "imagenet=B")))
    found = {given(step)["--config"][0]: given(step)["--data-dir"] for step in steps if step.words[0] == "evaluate"}
    assert found["configs/imagenet-linf-swin-l.yaml"] == ["B"] and found["configs/cifar10-linf-wrn-94-16.yaml"] == ["A"]


def test_what_is_not_there_is_refused() -> None:
    for names, config, words in (
        (["13"], {}, "no table '13'"),
        (["12"], {"only": "wrn"}, "not among the headline models: wrn"),
    ):
        with pytest.raises(ConfigError, match=words):
            plan(Reproduce.model_validate({"tables": names} | config))
    assert meansparse("reproduce", "3", "--jobs", "0").exit_code == 2


def test_the_figure_is_copied_to_the_pages() -> None:
    printed = meansparse("reproduce", "figure1", "--model", "digits", "--dry-run", "-o", "my pages").stdout.splitlines()
    assert printed[-1] == (
        "mkdir -p 'my pages' && "
        'cp "$(meansparse plot runs/tables/digits --what histogram --alpha 0.2 --device auto)" '
        "'my pages/figure1.png'"
    )


def a_chain() -> list[Step]:
    first = Step(("calibrate",))
    left, right = Step(("measure", "left"), (first,)), Step(("measure", "right"), (first,))
    return [first, left, Step(("table", "3"), (left,)), right, Step(("table", "8"), (right,))]


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(("keep_going", "n_run"), [(False, 2), (True, 4)])
def test_the_first_failure_ends_it(jobs: int, keep_going: bool, n_run: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, called = a_chain(), list[Step]()

    def call(self: Any, step: Step) -> int:
        called.append(step)
        return 75 if "left" in step.words else 0

    monkeypatch.setattr(_Runner, "_call", call)
    with pytest.raises(CommandFailed, match="exit code 75.*measure left") as failed:
        _Runner(jobs, keep_going).run(steps)
    assert failed.value.exit_code == 75
    assert steps[2] not in called, "what needs it is left out"
    assert len(called) in {n_run, n_run + jobs - 1}, "what was begun beside it ends"
    assert (steps[4] in called) == keep_going


def test_a_command_that_fails_is_named_and_gives_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed = meansparse("reproduce", "3", "--model", "resnet18-w16")
    assert failed.exit_code == 7 and not failed.stdout
    words = said(failed)
    assert "not finished (exit code 7)" in words and "meansparse calibrate --run runs/tables/resnet18-w16" in words


def test_nothing_goes_on_behind_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nexec sleep 300\n")
    stub.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(stub))
    monkeypatch.setattr(stage, "GRACE", 0.1)
    runner, begun = _Runner(2, keep_going=True), list[subprocess.Popen[str]]()

    def interrupted(*_: Any, **__: Any) -> None:
        while len(runner.processes) < 2:
            time.sleep(0.01)
        begun.extend(runner.processes)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.run([Step(("measure", "left")), Step(("measure", "right")), Step(("table", "3"))])
    assert [process.returncode for process in begun] == [-signal.SIGTERM] * 2 and not runner.processes
