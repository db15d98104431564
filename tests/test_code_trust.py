"""A run folder is data: code that it names runs where this user meant it to, and nowhere else."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from meansparse_cli import load_sparsified
from meansparse_cli.cli import app
from meansparse_cli.errors import ArtifactError
from tests.conftest import said

NET = """
from pathlib import Path
from torch import nn
with (Path(__file__).parent / "ran").open("a") as file:
    file.write("x")
def make():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 10))
other = make
"""
STAGES = {
    "fetch": (),
    "calibrate": ("--n-examples", "20"),
    "evaluate": ("--attack", "pgd-2", "--n-examples", "4", "--alpha", "0.2"),
    "sites": (),
    "export": (),
    "plot": ("--what", "blocked", "--n-examples", "4"),
}
POSITIONAL = {"export", "plot"}


def command(name: str, *arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [name, *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "evil.py").write_text(NET)
    return folder / "evil.py"


def finished_run(code: Path, run: Path) -> Path:
    """A finished run of that code, as its author made it."""
    for stage in ("fetch", "calibrate", "sweep-alpha"):
        options = {
            "calibrate": ("--n-examples", "20"),
            "sweep-alpha": ("--alphas", "0,0.2", "--n-examples", "10", "--attack", "pgd-2"),
        }
        words = ("--model", f"{code}:make", "--dataset", "digits", "--run", run, *options.get(stage, ()))
        result = command(stage, *words)
        assert result.exit_code == 0, result.output
    return run


@pytest.fixture(scope="module")
def author(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    code = tmp_path_factory.mktemp("author") / "evil.py"
    code.write_text(NET)
    return code, finished_run(code, code.with_name("run"))


@pytest.fixture
def theirs(author: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The author's code, and a copy of the run in the hands of another user."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    return author[0], Path(shutil.copytree(author[1], tmp_path / "run"))


def n_imports(code: Path) -> int:
    file = code.with_name("ran")
    return len(file.read_text()) if file.exists() else 0


@pytest.mark.parametrize("stage", STAGES)
def test_anothers_run_runs_no_code_until_it_is_allowed(stage: str, theirs: tuple[Path, Path]) -> None:
    code, run = theirs
    before, arguments = n_imports(code), [*([] if stage in POSITIONAL else ["--run"]), run, *STAGES[stage]]
    result = command(stage, *arguments)
    assert result.exit_code == ArtifactError.exit_code and n_imports(code) == before, result.output
    assert f"{code}:make" in said(result) and "--allow-code" in said(result)
    result = command(stage, *arguments, "--allow-code")
    assert result.exit_code == 0 and n_imports(code) > before, result.output


def test_ones_own_fetch_is_remembered_by_place_and_name(code: Path, tmp_path: Path) -> None:
    run = finished_run(code, tmp_path / "run")
    assert command("sites", "--run", run).exit_code == 0
    load_sparsified(run)
    copy = Path(shutil.copytree(code.parent, tmp_path / "elsewhere")) / "evil.py"
    report = run / "fetch.yaml"
    for other in (f"{copy}:make", f"{code}:other", "shutil:rmtree"):
        report.write_text(
            report.read_text().replace(yaml.safe_load(report.read_text())["results"]["model"]["name"], other)
        )
        (run / "fetch.yaml.copy").unlink(missing_ok=True)
        with pytest.raises(ArtifactError):
            load_sparsified(run)
        assert command("sites", "--run", run).exit_code == ArtifactError.exit_code
    assert n_imports(copy) == n_imports(code)  # of the copied file, which says how often the first one ran


@pytest.mark.parametrize("damage", [lambda file: file.write_text("{"), lambda file: (file.unlink(), file.mkdir())])
def test_a_damaged_record_is_none(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = tmp_path / "run"
    assert command("fetch", "--model", f"{code}:make", "--dataset", "digits", "--run", run).exit_code == 0
    assert command("sites", "--run", run).exit_code == 0
    before = n_imports(code)
    for file in (Path(os.environ["XDG_STATE_HOME"]) / "meansparse" / "code").iterdir():
        damage(file)
    assert command("sites", "--run", run).exit_code == ArtifactError.exit_code and n_imports(code) == before


def test_in_python_it_is_said_so(theirs: tuple[Path, Path]) -> None:
    code, run = theirs
    before = n_imports(code)
    with pytest.raises(ArtifactError, match="names code as its network") as refused:
        load_sparsified(run)
    assert "allow_code=True" in str(refused.value.hint) and n_imports(code) == before
    load_sparsified(run, allow_code=True)


def test_a_place_for_the_record_that_cannot_be_written_is_said(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert command("fetch", "--model", f"{code}:make", "--dataset", "digits", "--run", tmp_path / "run").exit_code == 0
    assert "need --model or --allow-code" in caplog.text


def test_code_that_is_not_found_from_here_is_called_so(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(code.parent)
    fetched = command("fetch", "--model", "evil.py:make", "--dataset", "digits", "--run", tmp_path / "run")
    assert fetched.exit_code == 0, fetched.output
    monkeypatch.chdir(tmp_path)
    refused = command("calibrate", "--run", tmp_path / "run", "--n-examples", "20")
    assert refused.exit_code == 10 and "in the folder where the model was fetched" in said(refused)
    monkeypatch.chdir(code.parent)
    assert command("calibrate", "--run", tmp_path / "run", "--n-examples", "20").exit_code == 0
