"""``evaluate --pool``: images from elsewhere are tried on both models, and believed in nothing."""

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from meansparse_cli.cli import app
from meansparse_cli.data.splits import load_split
from tests.conftest import said

WEAK = ("--alpha", "0.3", "--attack", "pgd-1", "--n-examples", "60", "--no-doubts")


def meansparse(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "100", "NO_COLOR": "1"})


def done(*arguments: object) -> Result:
    result = meansparse(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One evaluation under a strong attack, with its witnesses, and one under a weak attack."""
    folder = tmp_path_factory.mktemp("pool") / "run"
    done("calibrate", "--model", "digits", "--run", folder, "--n-examples", 200)
    strong = shlex.split("--alpha 0.3 --attack apgd --attack bpda-apgd-ce --n-examples 60 --no-doubts --save-witnesses")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meansparse_cli.attacks.apgd.N_STEPS", 15)
        done("evaluate", "--run", folder, *strong, "--name", "strong")
    done("evaluate", "--run", folder, *WEAK, "--name", "weak")
    return folder


@pytest.fixture
def witnesses(run: Path) -> Path:
    return run / "evaluations" / "strong" / "witnesses.safetensors"


def outcomes(run: Path, name: str) -> dict[str, Any]:
    with np.load(run / "evaluations" / name / "outcomes.npz") as arrays:
        return dict(arrays)


def robust(run: Path, name: str) -> dict[str, Any]:
    found = outcomes(run, name)
    return {model: found[f"{model}_first_broken_by"] < 0 for model in ("base", "sparsified")}


def worst_case(run: Path, name: str) -> dict[str, Any]:
    report = yaml.safe_load((run / "evaluations" / name / "evaluate.yaml").read_text())
    return dict(report["results"]["comparisons"][-1])


def test_what_fell_elsewhere_falls_here(run: Path, witnesses: Path) -> None:
    found = done("evaluate", "--run", run, *WEAK, "--pool", witnesses, "--name", "pooled").output
    assert re.search(r", base are of these 60 examples, \d+ inside the budget", said(found))
    alone, strong, pooled = (robust(run, name) for name in ("weak", "strong", "pooled"))
    for model in ("base", "sparsified"):
        assert (alone[model] & ~strong[model]).any(), "the pool has something to say"
        assert not (pooled[model] & ~strong[model]).any()
        assert (pooled[model] == (alone[model] & strong[model])).all(), "and no more than its images show"


def test_no_attacks_own_number_depends_on_it(run: Path, witnesses: Path) -> None:
    done("evaluate", "--run", run, *WEAK, "--pool", witnesses, "--name", "own")
    weak, own = outcomes(run, "weak"), outcomes(run, "own")
    assert weak["name"].tolist() == own["name"].tolist() == ["clean", "pgd-1", "transfer"]
    for model in ("base", "sparsified"):
        assert (weak[f"{model}_outcome"][:, :2] == own[f"{model}_outcome"][:, :2]).all()


def test_its_breaks_have_witnesses_that_hold(run: Path, witnesses: Path) -> None:
    done("evaluate", "--run", run, *WEAK, "--pool", witnesses, "--save-witnesses", "--name", "kept")
    kept = run / "evaluations" / "kept" / "witnesses.safetensors"
    report = yaml.safe_load(Path(done("verify", kept, "--run", run).stdout.strip()).read_text())["results"]
    assert report["admissible"]
    assert [judged["name"] for judged in report["sets"]] == ["base", "sparsified"]
    for judged in report["sets"]:
        name = judged["name"]
        assert judged[name]["robust_accuracy"] == worst_case(run, "kept")[f"{name}_accuracy"]


@pytest.mark.parametrize(("factor", "counts"), [(1 + 1e-7, True), (1.1, False)])
def test_beyond_the_budget_an_image_shows_nothing_but_for_rounding(
    factor: float, counts: bool, run: Path, witnesses: Path, tmp_path: Path
) -> None:
    tensors, test = load_file(witnesses), load_split("digits", None, "test")
    true = torch.stack([test[test.indices.index(i)][0] for i in tensors["base.indices"].tolist()])
    images = (true + (tensors["base.images"] - true) * factor).clamp(0, 1)
    file = tmp_path / "moved.safetensors"
    save_file({"images": images, "indices": tensors["base.indices"]}, file)
    name = f"moved-{counts}"
    done("evaluate", "--run", run, *WEAK, "--pool", file, "--name", name)
    assert (robust(run, name)["base"].sum() < robust(run, "weak")["base"].sum()) == counts


def test_a_foreign_tensor_of_the_whole_test_set(run: Path, tmp_path: Path) -> None:
    images = torch.load(run / "evaluations" / "strong" / "witnesses-base.pt", weights_only=True)
    images[::2] = float("nan")
    torch.save(images, tmp_path / "half.pt")
    done("evaluate", "--run", run, *WEAK, "--pool", tmp_path / "half.pt", "--name", "foreign")
    accuracy = {name: worst_case(run, name)["base_accuracy"] for name in ("weak", "strong", "foreign")}
    assert accuracy["strong"] < accuracy["foreign"] < accuracy["weak"]


def test_another_content_is_another_evaluation(run: Path, witnesses: Path, tmp_path: Path) -> None:
    file = tmp_path / "images.safetensors"
    tensors = load_file(witnesses)
    save_file({"images": tensors["base.images"][:1], "indices": tensors["base.indices"][:1]}, file)
    typed = ("evaluate", "--run", run, *WEAK, "--pool", file, "--name", "file")
    done(*typed)
    assert "already done" in said(done(*typed).output)
    save_file({"images": tensors["base.images"], "indices": tensors["base.indices"]}, file)
    assert "already done" not in said(done(*typed).output)
    assert robust(run, "file")["base"].sum() == (robust(run, "strong")["base"] & robust(run, "weak")["base"]).sum()


def test_a_file_of_another_test_set_is_refused(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file({"images": torch.rand(2, 1, 8, 8), "indices": torch.tensor([0, 10**6])}, file)
    refused = meansparse("evaluate", "--run", run, *WEAK, "--pool", file, "--name", "refused")
    assert refused.exit_code == 7
    assert "not of the test set" in said(refused)
    assert meansparse("evaluate", "--run", run, *WEAK, "--pool", tmp_path / "none.pt").exit_code == 7
