"""The pipeline in a notebook: the page's code runs, and its numbers are those of the commands."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from meansparse_cli import Budget, calibrate, compare, evaluate, sparsify
from meansparse_cli.attacks import PRESETS
from meansparse_cli.cli import app
from meansparse_cli.data.examples import stack_examples
from meansparse_cli.data.splits import load_split, take_examples
from meansparse_cli.errors import ConfigError, DataError
from meansparse_cli.models.source import load_model, resolve_model
from meansparse_cli.operator.active import operators_of
from meansparse_cli.operator.checkpoint import load_checkpoint

NOTEBOOK = Path(__file__).parent.parent / "docs" / "guide" / "notebook.ipynb"
PAGE = Path(__file__).parent.parent / "docs" / "guide" / "python.md"
ATTACKS = ("apgd-margin-10", "bpda-apgd-ce-10")


def test_the_page_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On fewer images, under attacks of the same kinds with fewer steps."""
    for name in ("fast", "surrogate"):
        short = (re.sub(r"-\d+$", "-5", attack) for attack in PRESETS[name])
        monkeypatch.setitem(PRESETS, name, tuple(short))
    monkeypatch.setattr("meansparse_cli.attacks.apgd.N_STEPS", 5)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert "batch_size=32" in code
    exec(compile(code.replace("batch_size=32", "batch_size=4"), str(PAGE), "exec"), {})
    said = capsys.readouterr().out
    assert "worst case" in said and "points in the worst case" in said


@pytest.mark.parametrize("n_cells", [2, pytest.param(None, marks=pytest.mark.slow)])
def test_the_notebook_prints_what_it_shows(n_cells: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in cells[:n_cells]:
        if "matplotlib" in (code := "".join(cell["source"])):
            continue  # a picture
        exec(compile(code, str(NOTEBOOK), "exec"), names)
        shown = "".join(text for output in cell["outputs"] for text in output["text"])
        # another processor may break another image
        assert re.sub(r"[-+]?\d+\.\d+", "", capsys.readouterr().out) == re.sub(r"[-+]?\d+\.\d+", "", shown)


def test_the_numbers_are_those_of_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    attacks = [word for name in ATTACKS for word in ("--attack", name)]
    for line in (
        ["calibrate", "--model", "digits", "--run", "r"],
        ["evaluate", "--run", "r", "--alpha", "0.4", "--n-examples", "24", "--no-doubts", *attacks],
    ):
        assert CliRunner().invoke(app, line).exit_code == 0
    model = load_model(resolve_model("digits"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    statistics = calibrate(model, DataLoader(load_split("digits", None, "calibration"), batch_size=200))
    theirs = load_checkpoint(Path("r/statistics.safetensors"))
    for ours, of_run in zip(statistics.statistics, theirs.statistics, strict=True):
        assert ours.count == of_run.count
        torch.testing.assert_close(ours.std, of_run.std, rtol=1e-12, atol=1e-14)
    sparse = sparsify(model, statistics, 0.4)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert not operators_of(model) and len(operators_of(sparse)) == 17
    x, y = stack_examples(take_examples(load_split("digits", None, "test"), 24))
    found = evaluate(sparse, x, y, budget=Budget("Linf", 0.1), attacks=ATTACKS)
    report = yaml.safe_load(Path("r/evaluate.yaml").read_text())["results"]
    for row, of_run in zip(found.comparisons, report["comparisons"], strict=True):  # from other random starts
        allowed = 0 if row.name == "clean" else 2.01 / 24
        assert row.name == of_run["name"] and abs(row.sparsified.fraction - of_run["sparsified_accuracy"]) <= allowed
    assert {row: d.difference for row, d in compare(found, found).items()} == {
        "clean": 0, "plain attacks": 0, "worst case": 0,
    }  # fmt: skip
    straight = evaluate(sparse, x[:4], y[:4], budget=Budget("Linf", 0.1), attacks=ATTACKS[1:])
    plain = evaluate(sparse, x[:4], y[:4], budget=Budget("Linf", 0.1), attacks=ATTACKS[:1])
    assert set(compare(plain, straight)) == {"clean", "worst case"}  # one of them has no plain attack
    for other in (found, evaluate(sparse, x[:4], y[:4], budget=Budget("Linf", 0.2), attacks=ATTACKS[:1])):
        with pytest.raises(DataError, match="other images, or of another budget"):
            compare(plain, other)


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(DataError, match="no batch"):
        calibrate(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), [])
    model = load_model(resolve_model("digits"))
    sparse = sparsify(model, calibrate(model, [torch.rand(8, 1, 8, 8)]), 0.2)
    operators_of(sparse)[0].set_alpha(0.1)
    with pytest.raises(ConfigError, match="2 alphas"):
        evaluate(sparse, torch.rand(2, 1, 8, 8), torch.zeros(2).long(), budget=Budget("Linf", 0.1))
