"""``meansparse sweep-alpha`` from the command line: what it refuses, takes up again, and hands to evaluate."""

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from meansparse_cli import load_sparsified
from meansparse_cli.cli import app
from tests.conftest import said

FACTORY = '''
import torch
from torch import nn

def three():
    """Three sites; learnt from nothing, and unsure enough to be attacked."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.GELU(), nn.Conv2d(6, 6, 3, stride=2), nn.GELU(), nn.Conv2d(6, 6, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )

class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = three()

    def forward(self, x):
        return self.net(x).detach()

def detached():
    return Detached()
'''
COMMON = ["--alphas", "0.4,0.2", "--eps", "2/255", "--attack", "pgd-8", "--max-clean-drop", "100"]


def meansparse(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def done(*arguments: str) -> tuple[Path, str]:
    result = meansparse(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return Path(result.stdout.strip().splitlines()[-1]), said(result)


def results(report: Path) -> dict[str, Any]:
    return yaml.safe_load(report.read_text())["results"]  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meansparse_cli.attacks.apgd.N_STEPS", 10)
    monkeypatch.setattr("meansparse_cli.diagnostics.search.N_STEPS", 10)
    monkeypatch.setattr("meansparse_cli.diagnostics.search.N_DRAWS", 5)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A calibrated run on 300 images whose labels are what the network says, some of them wrong."""
    (tmp_path / "three.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (300, 8, 8, 3)).astype(np.uint8)
    sys.path.insert(0, str(tmp_path))
    try:
        from three import three  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("three", None)
    with torch.no_grad():
        logits = three().eval()(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255)
        y = (logits - logits.mean(0)).argmax(1).numpy()
    y[:3] = [0, 1, 2]
    np.savez("data.npz", x=x, y=y)
    done("calibrate", "--model", "three.py:three", "--dataset", "data.npz", "--run", "run")
    return "run"


def test_images_may_be_added_and_only_they_are_attacked(run: str) -> None:
    first, words = done("sweep-alpha", "--run", run, *COMMON, "--n-examples", "10", "--no-racing")
    assert "0 was added as the baseline" in words and "sorted" in words
    assert "the paper's rule:" in words and "the worst case's:" in words
    few = results(first)
    second, _ = done("sweep-alpha", "--run", run, *COMMON, "--n-examples", "30", "--no-racing")
    many = results(second)
    done("calibrate", "--model", "three.py:three", "--dataset", "data.npz", "--run", "other")
    whole = results(done("sweep-alpha", "--run", "other", *COMMON, "--n-examples", "30", "--no-racing")[0])
    assert many["curve"] == whole["curve"]
    assert [few["n_examples"], many["n_examples"]] == [10, 30]
    files = sorted(f.name for f in Path(run, "state", "sweep-alpha").glob("*/block-*.pt"))
    assert files == ["block-000000-10.pt", "block-000010-20.pt"]
    # back to fewer: nothing is attacked, though the report is another one
    before = [f.stat().st_mtime_ns for f in Path(run).rglob("block-*.pt")]
    again = results(done("sweep-alpha", "--run", run, *COMMON, "--n-examples", "10", "--no-racing")[0])
    assert again["curve"] == few["curve"]
    assert [f.stat().st_mtime_ns for f in Path(run).rglob("block-*.pt")] == before


def test_an_alpha_for_each_site_goes_all_the_way_to_evaluate(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from meansparse_cli.selection.search import Found, Step

    def found(store: Any, groups: Any, **_: Any) -> Found:
        assert len(groups) == 3
        return Found((0.0, 0.8, 0.4), [Step("3", 0.4, 0.8, 0.1, 0.1, True)])

    monkeypatch.setattr("meansparse_cli.selection.search.MIN_UNSEEN", 10)
    monkeypatch.setattr("meansparse_cli.selection.rules.search_alphas", found)
    monkeypatch.setattr("meansparse_cli.selection.choice.ChoiceRule.is_enough", lambda *_: True)
    monkeypatch.setattr("meansparse_cli.selection.rules.paired_difference", _always_better)
    rule = shlex.split("--alpha-rule per-site --objective worst --min-gain 0 --block-size 10")
    swept, words = done("sweep-alpha", "--run", run, *COMMON, *rule)
    report = results(swept)
    assert report["alpha"] == 0.8
    assert list(report["search"]["site_alphas"].values()) == [0.0, 0.8, 0.4]
    assert "carries these alphas: 0, 0.8, 0.4" in words
    model = load_sparsified(run)
    assert [s.name for s in model.sites] == ["3", "5"]
    evaluated = results(done("evaluate", "--run", run, "--attack", "pgd-8", "--eps", "2/255", "--n-examples", "30")[0])
    x, y = (np.load("data.npz")[key] for key in "xy")
    from meansparse_cli.data.splits import load_split

    test = list(load_split("data.npz", None, "test").indices)
    with torch.no_grad():
        right = model(torch.from_numpy(x[test]).permute(0, 3, 1, 2).float() / 255).argmax(1).numpy() == y[test]
    clean = next(row for row in evaluated["comparisons"] if row["name"] == "clean")
    assert clean["sparsified_accuracy"] == pytest.approx(right.mean())
    # a reader of the report sees that it is not one alpha everywhere
    assert evaluated["operator"] == "alphas 0.4 to 0.8 at 2 of 3 sites"
    assert list(evaluated["site_alphas"].values()) == [0.0, 0.8, 0.4]
    assert "alphas 0.4 to 0.8 at 2 of 3 sites" in said(meansparse("report", run).output)


def _always_better(*_: Any) -> Any:
    from meansparse_cli.stats.paired import PairedDifference

    return PairedDifference(0.1, 0.01, 3, 0, 30)


def test_the_search_itself_runs_and_resumes(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meansparse_cli.selection.search.MIN_UNSEEN", 10)
    options = ["--alpha-rule", "per-depth", "--block-size", "10", "--max-clean-drop", "100", "--min-gain", "0"]
    report = results(done("sweep-alpha", "--run", run, *COMMON, *options)[0])
    assert report["alpha_rule"] == "per-depth"
    assert len(report["search"]["site_alphas"]) == 3
    before = {f: f.stat().st_mtime_ns for f in Path(run).rglob("block-*.pt")}
    (Path(run) / "sweep-alpha.yaml").unlink()
    assert results(done("sweep-alpha", "--run", run, *COMMON, *options)[0]) == report
    assert {f: f.stat().st_mtime_ns for f in before} == before


def test_bad_settings_are_refused_with_a_way_out(run: str) -> None:
    empty = meansparse("sweep-alpha", "--run", run, "--alphas", "0.5:0.1:0.1")
    assert (empty.exit_code, "empty range" in said(empty)) == (3, True)
    only_zero = meansparse("sweep-alpha", "--run", run, "--alphas", "0", "--eps", "2/255")
    assert (only_zero.exit_code, "no alpha above 0" in said(only_zero)) == (3, True)
    lacking = meansparse("sweep-alpha", "--run", run, *COMMON, "--objective", "apgd")
    assert lacking.exit_code == 3
    assert "add --attack apgd-ce" in said(lacking)
    few = meansparse("sweep-alpha", "--run", run, *COMMON, "--n-examples", "20", "--alpha-rule", "per-site")
    assert (few.exit_code, "every third block of held-out images" in said(few)) == (3, True)
    unknown = meansparse("sweep-alpha", "--run", run, *COMMON, "--objective", "fab")
    assert (unknown.exit_code, "objective" in unknown.stderr) == (3, True)
    alone = meansparse("evaluate", "--run", run, "--centre", "zero", "--eps", "2/255")
    assert (alone.exit_code, "sweep-alpha" in said(alone)) == (10, True)


def test_a_model_without_gradients_is_refused_before_anything_is_scored(run: str) -> None:
    done("calibrate", "--model", "three.py:detached", "--dataset", "data.npz", "--run", "blind")
    blind = meansparse("sweep-alpha", "--run", "blind", *COMMON)
    assert blind.exit_code == 12
    assert "no gradient" in said(blind)


def test_held_out_images_that_are_not_held_out_are_refused(run: str) -> None:
    arrays = np.load("data.npz")
    np.savez("shuffled.npz", x=arrays["x"][::-1], y=arrays["y"][::-1])
    overlap = meansparse("sweep-alpha", "--run", run, *COMMON, "--dataset", "shuffled.npz")
    assert overlap.exit_code == 7
    words = said(overlap)
    assert "held-out images are in the calibration split" in words
    assert "meansparse calibrate --run run" in words
    fresh = np.random.default_rng(9).integers(0, 256, arrays["x"].shape).astype(np.uint8)
    np.savez("fresh.npz", x=fresh, y=arrays["y"])
    done("sweep-alpha", "--run", run, *COMMON, "--dataset", "fresh.npz")
    np.savez("few.npz", x=arrays["x"][:1], y=arrays["y"][:1])
    few = meansparse("sweep-alpha", "--run", run, *COMMON, "--dataset", "few.npz")
    assert (few.exit_code, "split is empty" in said(few)) == (7, True)


def test_centre_reaches_the_checkpoint_and_evaluate_takes_it_with_an_alpha(run: str) -> None:
    from meansparse_cli.operator.checkpoint import load_checkpoint

    done("sweep-alpha", "--run", run, *COMMON, "--centre", "zero")
    assert load_checkpoint(Path(run, "meansparse.safetensors")).centre == "zero"
    refused = meansparse("evaluate", "--run", run, "--centre", "global-mean", "--eps", "2/255")
    assert (refused.exit_code, "go with --alpha" in said(refused)) == (3, True)
    few = ["--attack", "pgd-8", "--eps", "2/255", "--n-examples", "20", "--alpha", "0.8"]
    zero = results(done("evaluate", "--run", run, *few, "--centre", "zero")[0])
    refused = meansparse("evaluate", "--run", run, *few)  # the state on disk is of other operators
    assert (refused.exit_code, "other settings" in said(refused)) == (10, True)
    mean = results(done("evaluate", "--run", run, *few, "--fresh")[0])
    assert zero["comparisons"][0]["sparsified_accuracy"] != mean["comparisons"][0]["sparsified_accuracy"]


def test_plot_draws_from_the_run(run: str) -> None:
    unswept = meansparse("plot", run, "--what", "histogram")
    assert (unswept.exit_code, "meansparse sweep-alpha" in said(unswept)) == (10, True)
    histogram = ["plot", run, "--what", "histogram", "--alpha", "0.2"]  # statistics and an alpha are enough
    before = done(*histogram)[0].read_bytes()
    done("sweep-alpha", "--run", run, *COMMON)
    for options in (
        (),
        ("--what", "blocked", "--alpha", "0.4"),
        ("--what", "histogram", "--site", "1", "--channel", "5"),
    ):
        png, _ = done("plot", run, *options)
        assert png.read_bytes().startswith(b"\x89PNG")
        assert png.with_suffix(".svg").exists()
    assert done(*histogram)[0].read_bytes() == before
    done("calibrate", "--run", run, "--fraction", "0.5")
    _, words = done(*histogram)
    assert "is of other statistics" in words
    outdated = meansparse("plot", run, "--what", "histogram")
    assert (outdated.exit_code, "another calibrate.yaml" in said(outdated)) == (10, True)
    done("calibrate", "--run", run)
    done("sweep-alpha", "--run", run, *COMMON)
    wrong = meansparse("plot", run, "--what", "histogram", "--site", "nine")
    assert (wrong.exit_code, "no site 'nine'" in said(wrong)) == (8, True)
