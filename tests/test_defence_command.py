"""``evaluate --defence``: the modules of a network of the user's own, asked from the command line."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from meansparse_cli.cli import app
from meansparse_cli.errors import ArtifactError, ConfigError, MeanSparseError, SiteError

NETWORK = """
import torch
from torch import nn
from meansparse_cli.models.source import load_model, resolve_model

class Levels(nn.Module):
    def forward(self, x):
        return (x * 3).round() / 3

class Noise(nn.Module):
    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)

class Behind(nn.Module):
    def __init__(self, front):
        super().__init__()
        self.front, self.network = front, load_model(resolve_model("digits"))
    def forward(self, x):
        return self.network(self.front(x))

def levels():
    return Behind(Levels())
def noise():
    return Behind(Noise())
def smooth(x):
    return SLOPE * x
SLOPE = 1.0
def narrow(x):
    return x[:, :, :2]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETWORK)
    for name in ("levels", "noise"):
        typed("fetch", "--model", f"nets.py:{name}", "--dataset", "digits", "--run", name)
    return tmp_path


def typed(*words: str, fails_as: type[MeanSparseError] | None = None) -> Any:
    result = CliRunner().invoke(app, words)
    expected = 0 if fails_as is None else fails_as.exit_code
    assert result.exit_code == expected, result.output
    return result


def evaluated(run: str, *words: str, n_steps: int = 10, fails_as: type[MeanSparseError] | None = None) -> Any:
    """The report, or what was said."""
    attacks = ("--attack", f"apgd-margin-{n_steps}", "--attack", f"bpda-apgd-ce-{n_steps}")
    short = ("--n-examples", "12", "--no-doubts", "--allow-code", *attacks)
    result = typed("evaluate", "--run", run, *short, *words, fails_as=fails_as)
    return (
        " ".join(result.output.replace("│", " ").split())
        if fails_as
        else yaml.safe_load(Path(result.stdout.strip()).read_text())
    )


def test_a_quantiser_is_named(folder: Path) -> None:
    words = "levels", "--defence", "front", "--n-examples", "40"
    report = evaluated(*words, n_steps=30)
    assert report["results"]["verdict"] == "gradient masking"
    assert report["results"]["operator"] == "defence front"
    assert report["config"]["settings"]["defence"] == ["front"] and "calibrate.yaml" not in report["inputs"]
    assert evaluated(*words, n_steps=30) == report  # done already


def test_shards_of_a_defence_are_put_together(folder: Path) -> None:
    for shard in ("1/2", "2/2"):
        evaluated("levels", "--defence", "front", "--shard", shard)
    whole = evaluated("levels", "--defence", "front")["results"]
    alone = evaluated("levels", "--defence", "front", "--name", "alone")["results"]
    assert whole["comparisons"] == alone["comparisons"]


def test_another_surrogate_is_another_evaluation(folder: Path) -> None:
    evaluated("levels", "--defence", "front=nets.py:smooth")
    Path("nets.py").write_text(NETWORK.replace("SLOPE = 1.0", "SLOPE = -1.0"))
    said = evaluated("levels", "--defence", "front=nets.py:smooth", fails_as=ArtifactError)
    assert "--name" in said


def test_a_base_of_its_own(folder: Path) -> None:
    typed("fetch", "--model", "digits", "--run", "plain")
    beside = evaluated("levels", "--defence", "front", "--base", "plain")["results"]
    off = evaluated("levels", "--defence", "front", "--name", "off")["results"]
    assert beside["operator"] == "defence front beside digits"
    assert beside["comparisons"][0] == off["comparisons"][0]  # the network behind the quantiser is that of digits
    assert "meansparse fetch --model digits" in evaluated("levels", "--base", "digits", fails_as=ArtifactError)


def test_a_random_defence_needs_draws(folder: Path) -> None:
    assert "--draws" in evaluated("noise", "--defence", "front", fails_as=ConfigError)
    report = evaluated("noise", "--defence", "front", "--draws", "3")
    assert report["results"]["operator"] == "defence front, 3 draws"


@pytest.mark.parametrize(
    ("words", "said", "error"),
    [
        (("--defence", "frnt"), "front", ConfigError),
        (("--defence", "network.conv1.weight"), "a tensor, not a module", ConfigError),
        (("--defence", "front=softer"), "expected identity, own", ConfigError),
        (("--defence", "front=nets.py:narrow"), "its surrogate", SiteError),
        (("--defence", "front=nets.py:SLOPE"), "expected a function", ConfigError),
        (("--defence", "front", "--alpha", "0.2"), "--alpha is about MeanSparse", ConfigError),
        (("--draws", "3"), "--defence PATTERN", ConfigError),
    ],
)
def test_what_means_nothing_is_refused(
    words: tuple[str, ...], said: str, error: type[MeanSparseError], folder: Path
) -> None:
    assert said in evaluated("levels", *words, fails_as=error)


def test_another_base_of_the_same_name_is_another_evaluation(folder: Path) -> None:
    Path("plain.py").write_text(
        "from nets import Behind\nfrom torch import nn\n\n\ndef make():\n    return Behind(nn.Identity())\n"
    )
    typed("fetch", "--model", "plain.py:make", "--dataset", "digits", "--run", "plain")
    evaluated("levels", "--defence", "front", "--base", "plain")
    Path("plain.py").write_text("# other\n" + Path("plain.py").read_text())
    assert "--name" in evaluated("levels", "--defence", "front", "--base", "plain", fails_as=ArtifactError)


def test_verify_does_not_judge_a_defence_by_another_model(folder: Path) -> None:
    evaluated("levels", "--defence", "front", "--save-witnesses")
    said = typed("verify", "levels/witnesses.safetensors", "--run", "levels", "--allow-code", fails_as=ConfigError)
    assert "--pool" in said.output
    again = evaluated("levels", "--defence", "front", "--name", "again", "--pool", "levels/witnesses.safetensors")
    assert again["results"]["pool"]


def test_a_random_defence_goes_on_with_what_it_found(folder: Path) -> None:
    words = "noise", "--defence", "front", "--draws", "2", "--n-examples", "24"
    first = evaluated(*words)["results"]["comparisons"]
    for file in ("evaluate.yaml", "state/reports/evaluate.yaml"):
        (Path("noise") / file).unlink()
    for before, after in zip(first, evaluated(*words)["results"]["comparisons"], strict=True):
        if before["attacks"] and "transfer" not in before["attacks"]:
            assert before["sparsified_accuracy"] == after["sparsified_accuracy"], before["name"]
