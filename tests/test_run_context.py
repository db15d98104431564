"""What one ``evaluate`` reads and computes: each report once, its images once, the classes in one forward pass."""

import shutil
import sys
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner

from meansparse_cli import foreign
from meansparse_cli.attacks import judge
from meansparse_cli.cli import app
from meansparse_cli.data import open as opening
from meansparse_cli.data.examples import stack_examples
from meansparse_cli.data.splits import load_split
from meansparse_cli.models.networks import ResNet18
from meansparse_cli.operator.module import MeanSparse


def meansparse(*arguments: str) -> None:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output + repr(result.exception)


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meansparse_cli.attacks.apgd.N_STEPS", 10)
    monkeypatch.setattr("meansparse_cli.diagnostics.search.N_STEPS", 10)
    monkeypatch.setattr("meansparse_cli.diagnostics.search.N_DRAWS", 5)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    meansparse("calibrate", "--model", "digits", "--run", str(folder), "--n-examples", "64")
    return folder


def evaluate(run: Path, *more: str) -> None:
    options = (
        "--alpha",
        "0.3",
        "--eps",
        "0.2",
        "--n-examples",
        "12",
        "--attack",
        "apgd-ce",
        "--attack",
        "bpda-apgd-ce",
    )
    meansparse("evaluate", "--run", str(run), *options, *more)


def callers() -> set[str]:
    """The names of the package's functions that are at work."""
    names, frame = set(), sys._getframe(1)
    while frame is not None:
        if "/meansparse_cli/" in frame.f_code.co_filename:
            names.add(frame.f_code.co_name)
        frame = frame.f_back  # type: ignore[assignment]
    return names


def test_each_report_is_read_once_and_each_data_set_opened_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[str] = Counter()
    opened: list[str] = []
    read_text, open_digits = foreign.read_text, opening._open_digits

    def reading(path: Path) -> str:
        read[path.name] += path.suffix == ".yaml"
        return read_text(path)

    monkeypatch.setattr(foreign, "read_text", reading)
    monkeypatch.setattr(opening, "_open_digits", lambda: opened.append("digits") or open_digits())
    evaluate(run, "--no-doubts", "--save-witnesses")
    assert read == {"fetch.yaml": 1, "calibrate.yaml": 1}
    assert opened == ["digits"]

    read.clear()
    opened.clear()
    evaluate(run, "--no-doubts", "--save-witnesses")  # nothing is left to do
    assert read == {"fetch.yaml": 1, "calibrate.yaml": 1, "evaluate.yaml": 1}
    assert opened == ["digits"]


def test_one_forward_pass_counts_the_classes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, n_passes = ResNet18.forward, Counter[str]()

    def counting(self: ResNet18, x: Tensor) -> Tensor:
        n_passes[next((name for name in callers() if "classes" in name), "for something else")] += 1
        return forward(self, x)

    monkeypatch.setattr(ResNet18, "forward", counting)
    evaluate(run, "--n-doubt-examples", "2")
    assert n_passes.pop("for something else") > 10
    assert n_passes == {"count_classes": 1}


def test_each_break_is_judged_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On each model, an image found on the other one too; what the sanity checks find makes no second round."""
    x, _ = stack_examples(load_split("digits", None, "test"))
    clean = {image.numpy().tobytes() for image in x}
    judged: Counter[tuple[bytes, tuple[float, ...]]] = Counter()
    logits = judge.logits

    def judging(problem: Any, images: Tensor, alphas: Tensor | None = None) -> Tensor:
        operators = [m for m in problem.model.modules() if isinstance(m, MeanSparse)]
        as_it_stands = tuple(float(operator.alpha) for operator in operators)
        for i, image in enumerate(images if "diagnose" not in callers() else []):
            if (pixels := image.cpu().numpy().tobytes()) not in clean:
                judged[pixels, as_it_stands if alphas is None else tuple(alphas[i].tolist())] += 1
        return logits(problem, images, alphas)

    for module in [m for name, m in sys.modules.items() if name.startswith("meansparse_cli.")]:
        if getattr(module, "logits", None) is logits:
            monkeypatch.setattr(module, "logits", judging)
    evaluate(run, "--n-doubt-examples", "2", "--save-witnesses")
    assert len(judged) > 12
    assert set(judged.values()) == {1}


def test_embedded_weights_are_taken_from_where_the_package_lies_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they lay when they were fetched, as long as they are the same."""
    files, run, package = resources.files, tmp_path / "run", "meansparse_cli.models"
    installed = Path(str(files(package)))
    place = ["before"]
    monkeypatch.setattr(resources, "files", lambda of: tmp_path / place[-1] if of == package else files(of))
    (tmp_path / "before/weights").mkdir(parents=True)
    shutil.copy(installed / "weights/digits.safetensors", tmp_path / "before/weights")
    meansparse("fetch", "--model", "digits", "--run", str(run))
    report = (run / "fetch.yaml").read_text()
    (tmp_path / "before").rename(tmp_path / "now")
    place.append("now")
    meansparse("fetch", "--run", str(run))
    assert (run / "fetch.yaml").read_text() == report  # it is there already
    meansparse("calibrate", "--run", str(run), "--n-examples", "64")

    shutil.copy(installed / "weights/resnet18-w16.safetensors", tmp_path / "now/weights/digits.safetensors")
    result = CliRunner().invoke(app, ["calibrate", "--run", str(run), "--n-examples", "64", "--fresh"])
    assert result.exit_code == 10
    assert "changed since they were fetched" in " ".join(result.output.replace("│", " ").split())
