"""``--sites`` from the command line to the checkpoint."""

import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from meansparse_cli.cli import app
from meansparse_cli.operator.checkpoint import load_checkpoint
from meansparse_cli.reporting.model_tables import show_sites
from meansparse_cli.runs.report import read_report
from meansparse_cli.settings.resolve import resolve
from meansparse_cli.settings.stages import CalibrateConfig
from meansparse_cli.sites.find import Site
from tests.conftest import said

runner = CliRunner()


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_sites_lists_all_and_marks_the_chosen() -> None:
    result = runner.invoke(app, ["sites", "--model", "digits", "--sites", "first:2,after-addition", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    assert [row["index"] for row in rows] == list(range(17))
    chosen = {row["index"]: row["chosen_by"] for row in rows if row["chosen_by"]}
    assert chosen == {0: "first:2", 1: "first:2"} | dict.fromkeys(range(2, 17, 2), "after-addition")
    assert rows[1]["main_path"] and rows[2]["after_addition"] and rows[2]["layout"] == "channels-first"


def test_calibrate_uses_the_chosen_sites_alone_and_says_so() -> None:
    command = ["calibrate", "--model", "digits", "--n-examples", "20", "--sites", "main-path,0"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    path = Path(result.stdout.strip())
    results = read_report(path, "calibrate", mend="")["results"]
    assert (results["rule"], results["n_sites_found"], results["n_gates_left_out"]) == ("main-path,0", 17, 0)
    indices = [0, *range(1, 17, 2)]
    assert [row["index"] for row in results["sites"]] == indices
    checkpoint = load_checkpoint(path.with_name("statistics.safetensors"))
    assert (checkpoint.rule, [s.index for s in checkpoint.sites]) == ("main-path,0", indices)

    assert "already done" in said(runner.invoke(app, command))
    result = runner.invoke(app, [*command[:-1], "single:3"])
    assert "(sites: main-path,0 -> single:3)" in said(result)
    assert [s.index for s in load_checkpoint(path.with_name("statistics.safetensors")).sites] == [3]


@pytest.mark.parametrize(
    ("rule", "code", "says"),
    [
        ("layer1.0.act9", 8, "did you mean layer1.0.act"),
        ("20", 8, "the indices are 0-16"),
        ("nothing.*", 8, "meansparse sites"),
        ("9-5", 3, "empty range"),
        ("first:0", 3, "from 1 up"),
    ],
)
@pytest.mark.parametrize("command", ["sites", "calibrate"])
def test_rules_that_choose_nothing(command: str, rule: str, code: int, says: str) -> None:
    result = runner.invoke(app, [command, "--model", "digits", "--sites", rule])
    assert result.exit_code == code, result.output
    assert says in said(result)
    assert "Traceback" not in result.output


def test_a_rule_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("calibrate:\n  sites: [0, 7-12, layer1.*]\n")
    settings, _ = resolve("calibrate", CalibrateConfig, tmp_path / "c.yaml", {})
    assert settings.sites == "0,7-12,layer1.*"


FACTORIES = """
from torch import nn

class Sized(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.head = nn.ReLU(), nn.Linear(3, 3)
    def forward(self, x):
        if x.shape[-1] != 32:
            raise ValueError(f"expected 32 pixels, found {x.shape[-1]}")
        return self.head(self.act(x).mean((2, 3)))

def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
"""


@pytest.mark.parametrize("command", ["sites", "calibrate"])
@pytest.mark.parametrize(
    ("factory", "code", "says"),
    [("Sized", 7, "expected 32 pixels, found 8"), ("linear", 8, "no activation was found")],
)
def test_models_that_have_no_sites(command: str, factory: str, code: int, says: str, npz: Path, tmp_path: Path) -> None:
    (tmp_path / "own_networks.py").write_text(FACTORIES)
    result = runner.invoke(app, [command, "--model", f"own_networks.py:{factory}", "--dataset", str(npz)])
    assert result.exit_code == code, result.output
    assert says in said(result)
    assert "Traceback" not in result.output


def test_the_table_is_readable_at_80_columns() -> None:
    name = "stages.stage3.stage3-block17.F.b.2"
    sites = [
        Site(
            105, name, name, "function", "leaky_relu", "channels-last", 3, 6912, (56, 56, 6912), False, main_path=True
        ),
        Site(106, f"{name}.se.act", name, "module", "Sigmoid", "channels-first", 1, 216, (216, 1, 1), True),
    ]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(show_sites(sites, {105: "first:3"}))
    text = capture.get()
    assert all(len(line.rstrip()) <= 80 for line in text.splitlines())
    assert "…" not in text
    for word in ("105", "leaky_relu()", "NHWC", "6912", "main path", "gate", "first:3", "1 of 2 sites chosen"):
        assert word in text
    (header,) = [line for line in text.splitlines() if "activation" in line]
    column = slice(header.index("site"), header.index("activation"))  # long names go on in the next line
    assert "".join(line[column].strip() for line in text.splitlines()).endswith(f"{name}{name}.se.act")
