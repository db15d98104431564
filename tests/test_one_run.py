"""``run`` as one command, what shards are given, and names and folders that a system refuses."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from meansparse_cli.cli import app
from meansparse_cli.diagnostics.outputs import _inputs
from meansparse_cli.diagnostics.subject import Subject
from meansparse_cli.errors import ArtifactError
from meansparse_cli.runs.folder import file_name, run_folder_lock
from meansparse_cli.stages import calibrate, fetch
from tests.conftest import said

FEW = ["--attack", "pgd-3", "--eps", "0.06", "--n-examples", "6", "--alpha", "0.3", "--no-doubts"]


def type_line(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    assert type_line("calibrate", "--model", "digits", "--n-examples", 40, "--run", folder).exit_code == 0
    return folder


# ---- run


@pytest.mark.parametrize(
    ("words", "exit_code", "sentence"),
    [
        (["--attack", "autoattck"], 3, "did you mean autoattack"),
        (["--attack", "soft-0-apgd-ce"], 3, "temperature must be above 0"),
        (["--device", "cuda:77"], 3, "device 'cuda:77' cannot be used"),
        (["--eps", "8"], 3, "did you mean --eps 8/255"),
        (["--norm", "L2", "--eps", "9"], 3, "eps is 9 in L2"),
        (["--alphas", "-1"], 3, "must be 0 or above"),
        (["--n-examples", "5000"], 7, "5000 examples were asked for"),
        (["--dataset", "nowhere.npz"], 7, "no data set"),
        (["--alpha-rule", "per-site", "--config", "few.yaml"], 3, "a search judges on every third block"),
        (["--config", "pool.yaml"], 7, "no file gone.pt"),
        (["--config", "both.yaml"], 3, "both --fraction and --n-examples"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], exit_code: int, sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("few.yaml").write_text("sweep-alpha: {n_examples: 20}\n")
    Path("pool.yaml").write_text("evaluate: {pool: [gone.pt]}\n")
    Path("both.yaml").write_text("calibrate: {fraction: 0.5, n_examples: 9}\n")
    refused = type_line("run", "--model", "digits", "--run", "r", *words)
    assert refused.exit_code == exit_code and sentence in said(refused), refused.stderr
    assert not list(Path("r").glob("*.yaml"))


def test_nobody_gets_in_between_the_stages_of_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, tried = tmp_path / "run", []

    def in_the_gap(stage: Any) -> Any:
        def then(*words: Any, **named: Any) -> Path:
            path: Path = stage(*words, **named)
            with pytest.raises(ArtifactError, match="another command is at work"), run_folder_lock(folder):
                pass
            tried.append(path)
            return path

        return then

    monkeypatch.setattr(fetch, "fetch", in_the_gap(fetch.fetch))
    monkeypatch.setattr(calibrate, "calibrate", in_the_gap(calibrate.calibrate))
    monkeypatch.setattr("meansparse_cli.attacks.apgd.N_STEPS", 5)
    config = tmp_path / "c.yaml"
    config.write_text(
        "calibrate: {n_examples: 40}\nsweep-alpha: {n_examples: 12, alphas: [0.2], block_size: 6, attack: pgd-3}\n"
    )
    done = type_line("run", "--model", "digits", "--run", folder, "--config", config, *FEW[:6], "--no-doubts")
    assert done.exit_code == 0, done.stderr
    assert [path.name for path in tried] == ["fetch.yaml", "calibrate.yaml"]


# ---- shards


def test_a_shard_tries_the_pool_that_it_is_given(run: Path, tmp_path: Path) -> None:
    from meansparse_cli.data.splits import load_split

    pool = tmp_path / "pool.pt"
    torch.save(torch.stack([image for image, _ in load_split("digits", None, "test")]), pool)
    done = type_line("evaluate", "--run", run, *FEW, "--shard", "1/2", "--pool", pool)
    assert done.exit_code == 0, done.stderr
    results = yaml.safe_load((run / "shards" / "shard-1-of-2" / "evaluate.yaml").read_text())["results"]
    assert results["pool"] == {str(pool): 3}


def test_a_shard_that_began_elsewhere_is_named_with_its_host_and_the_commands_work(run: Path) -> None:
    for number in (1, 2):
        assert type_line("evaluate", "--run", run, *FEW, "--shard", f"{number}/3").exit_code == 0
    chunk = next((run / "state" / "evaluate").glob("sparsified/pgd-3/shard-2-of-3-*.pt"))
    chunk.unlink()
    missing = type_line("evaluate", "--run", run, *FEW)
    assert missing.exit_code == 10
    assert f"shard 2/3: 2 of 2 examples are not done; begun on host {os.uname().nodename}" in said(missing)
    assert "shard 3/3: 2 of 2 examples are not done; never begun" in said(missing)
    assert not (run / "evaluate.yaml").exists()
    for number in (2, 3):
        assert type_line("evaluate", "--run", run, *FEW, "--shard", f"{number}/3").exit_code == 0
    assert type_line("evaluate", "--run", run, *FEW).exit_code == 0


# ---- threats


@pytest.mark.parametrize("other", ["Linf", "corruptions"])
def test_a_threat_that_is_not_the_run_s_is_refused(run: Path, other: str) -> None:
    from meansparse_cli.runs.folder import locate_run
    from meansparse_cli.runs.report import write_report
    from meansparse_cli.settings.stages import EvaluateConfig

    report = yaml.safe_load((run / "fetch.yaml").read_text())
    report["results"]["model"]["threat"] = "L2"
    write_report(run / "fetch.yaml", stage="fetch", config=report["config"], results=report["results"], seconds=0.0)
    assert locate_run(EvaluateConfig(run=run)).norm == locate_run(EvaluateConfig(run=run, threat="L2")).norm == "L2"
    refused = type_line("evaluate", "--run", run, "--threat", other)
    assert refused.exit_code == 3 and f"--threat {other}: {run.name}" in said(refused).replace(f"{run.parent}/", "")


# ---- few examples


@pytest.mark.parametrize(
    ("n", "n_more", "status"),
    [
        (8, 0, "too few"),
        (8, 1, "too few"),
        (39, 0, "too few"),
        (100, 0, "pass"),
        (100, 3, "too few"),
        (100, 15, "warn"),
        (8, -7, "pass"),
    ],
)
def test_few_examples_read_too_few(n: int, n_more: int, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``n_more`` of n examples are right on another scale and wrong as they are."""
    x, first = torch.rand(n, 1, 2, 2), torch.arange(n) < abs(n_more)
    clean = first if n_more < 0 else torch.zeros(n, dtype=torch.bool)
    subject = Subject.__new__(Subject)
    object.__setattr__(subject, "name", "base")
    object.__setattr__(subject, "examples", type("E", (), {"x": x})())
    other = torch.zeros(n, dtype=torch.bool) if n_more < 0 else first
    monkeypatch.setattr(Subject, "is_right", lambda self, images: clean if images is x else other)
    assert _inputs(subject).status == status


# ---- what a system refuses


def test_a_command_that_fails_at_once_leaves_no_folder(tmp_path: Path) -> None:
    assert type_line("evaluate", "--model", "digits", "--run", tmp_path / "a" / "typo").exit_code == 10
    assert type_line("verify", "nowhere.pt", "--model", "nothing", "--run", tmp_path / "typo").exit_code != 0
    assert not list(tmp_path.iterdir())


def test_a_lock_that_is_a_folder_is_named_with_what_mends_it(run: Path) -> None:
    (run / ".lock").unlink()
    (run / ".lock" / "inside").mkdir(parents=True)
    refused = type_line("calibrate", "--run", run, "--n-examples", 40)
    assert refused.exit_code == 11 and shlex.join(["rm", "-r", ""])[:5] in said(refused)
    subprocess.run(["rm", "-r", str(run / ".lock")], check=True)
    assert type_line("calibrate", "--run", run, "--n-examples", 40).exit_code == 0


@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (["calibrate", "--model", "digits", "--run", "r" * 256], 11),
        (["calibrate", "--model", "digits", "--run", "ü" * 128 + "/deep"], 11),
        (["fetch", "--model", "digits", "--run", "loop/run"], 11),
        (["evaluate", "--run", "r", "--name", "n" * 256], 3),
    ],
)
def test_names_that_no_file_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], exit_code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    refused = type_line(*words)
    assert refused.exit_code == exit_code and isinstance(refused.exception, SystemExit), refused.exception


def test_a_long_name_of_a_model_makes_a_folder_that_can_be() -> None:
    long = "a" * 300
    assert len(file_name(long).encode()) < 100 and file_name(long) != file_name(long + "b")
    assert file_name("cifar10-Linf-x y") == "cifar10-Linf-x_y"


def test_a_folder_that_is_gone_under_the_command(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    line = f"cd {gone} && rmdir {gone} && {shlex.quote(sys.executable)} -m meansparse_cli fetch --model digits"
    refused = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert refused.returncode == 11 and "this was started in is gone" in said(refused), refused.stderr
