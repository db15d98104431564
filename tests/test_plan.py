"""``--plan``: what it says is near the truth in passes, and nothing is written."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from meansparse_cli.cli import app
from tests.conftest import write_quick_network

ATTACKS = ("--attack", "apgd-margin-30", "--attack", "bpda-apgd-ce-30")
EPS = ("--eps", "0.06")


def typed(*words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is calibrated."""
    place = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        typed("calibrate", *write_quick_network(place), "--run", "r", "--n-examples", "60")
    return place


@pytest.fixture(autouse=True)
def there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def files() -> dict[str, float]:
    return {str(file): file.stat().st_mtime for file in Path().rglob("*") if file.is_file() and file.name != ".lock"}


def passes_in(said: str) -> int:
    found = re.search(r"about ([\d,]+) passes", said)
    assert found, said
    return int(found[1].replace(",", ""))


def test_a_plan_of_a_training_and_of_images_to_judge() -> None:
    torch.save(torch.rand(179, 1, 8, 8), "made.pt")
    before = files()
    said = typed("verify", "made.pt", "--run", "r", *EPS, "--alpha", "0.3", "--plan")
    assert passes_in(said) == 179 * 2 * 2 and "179 examples x 2 models" in said, "each clean and with its image"
    said = typed("train", "--width", "2", "--epochs", "4", "--n-examples", "300", "--run", "t", "--plan")
    assert "300 images x 4 epochs" in said and "done already: 0 %" in said
    assert files() == before and not Path("t").exists()
    typed("train", "--width", "2", "--epochs", "4", "--n-examples", "300", "--plan", "--fresh", code=3)


@pytest.mark.parametrize(
    ("stage", "words", "what"),
    [
        ("evaluate", ("--alpha", "0.3", *ATTACKS, "--no-doubts"), "60 images x 2 models x 2 attacks"),
        ("measure", ("--alphas", "0.2,0.3", "--attack", "apgd-ce"), "60 images x 3 variants x 2 attacks"),
        ("sweep-alpha", ("--alphas", "0.1,0.2", "--no-racing"), "60 images x 3 variants x 2 attacks"),
    ],
)
def test_a_plan_is_near_the_truth(stage: str, words: tuple[str, ...], what: str) -> None:
    command, before = (stage, "--run", "r", "--n-examples", "60", *EPS, *words), files()
    said = typed(*command, "--plan")
    assert what in said and "done already: 0 %" in said and "8 such workers" in said
    assert files() == before
    path = Path(typed(*command).split()[-1])
    results = yaml.safe_load(path.read_text())["results"]
    steps = [s for rows in results["attacks"].values() for s in rows] if stage == "evaluate" else [results]
    spent = sum(step["forward_passes"] + 2 * step["backward_passes"] for step in steps)
    assert 1 / 1.5 < passes_in(said) / spent < 1.5
    assert "already done" in typed(*command, "--plan")


def test_what_is_done_counts() -> None:
    command = ("evaluate", "--run", "r", "--name", "n", "--alpha", "0.3", *EPS, *ATTACKS, "--no-doubts", "--n-examples")
    typed(*command, "30")
    found = re.search(r"done already: (\d+) %", typed(*command, "60", "--plan"))
    assert found and 30 < int(found[1]) < 70


def test_of_a_pass_for_statistics() -> None:
    said = typed("calibrate", "--run", "r", "--n-examples", "80", "--plan")
    assert "plan of calibrate: 80 images" in said and "done already" in said


def test_a_plan_throws_nothing_away() -> None:
    said = typed("evaluate", "--run", "r", "--alpha", "0.3", *EPS, "--plan", "--fresh", code=3)
    assert "throws away" in said


def test_a_plan_of_a_chain_goes_as_far_as_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def here(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        result = CliRunner().invoke(app, command[3:])
        told.append(" ".join(result.stderr.split()))
        return subprocess.CompletedProcess(command, result.exit_code, stdout=result.stdout)

    told: list[str] = []
    monkeypatch.setattr(subprocess, "run", here)
    chain = ("reproduce", "9", "--model", "digits", "--n-examples", "20", "--quick", "--run", "c", "--plan")
    said = typed(*chain)
    assert "plan of calibrate: " in told[0] and len(told) == 1, "nothing is measured before it"
    assert "no plan before those above are done: meansparse measure" in said and not Path("c/calibrate.yaml").exists()

    typed("calibrate", "--run", "c", "--model", "digits", "--batch-size", "250")
    assert "no plan" not in typed(*chain) and "already done" in told[1]
    assert "plan of measure: 20 images x 3 variants x 7 attacks x 8 eps" in told[2]
    assert not Path("c/state/measure").exists()
