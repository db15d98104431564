"""``evaluate --shard I/N``: jobs that share an evaluation's examples end in the report of one job."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from meansparse_cli.cli import app
from meansparse_cli.errors import ArtifactError
from meansparse_cli.runs.folder import run_folder_lock
from meansparse_cli.settings.shard import Shard, parse_shard, read_shard, shard_of_job
from tests.conftest import said, write_quick_network

N = 23
ATTACKS = ["--attack", "pgd-3", "--attack", "pgd-60"]
OPTIONS = [*ATTACKS, "--alpha", "0.3", "--n-examples", str(N), "--no-doubts", "--eps", "0.06"]


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    words = ["calibrate", *write_quick_network(folder), "--run", str(folder / "calibrated")]
    assert CliRunner().invoke(app, words).exit_code == 0
    return folder / "calibrated"


@pytest.fixture
def run(calibrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "run"))


def evaluate(run: Path, *more: str) -> Any:
    return CliRunner().invoke(app, ["evaluate", "--run", str(run), *OPTIONS, *more])


def results(run: Path) -> dict[str, Any]:
    """Of the report, without the clock."""
    content = dict(yaml.safe_load((run / "evaluate.yaml").read_text())["results"])
    content.pop("seconds")
    return content


# ---- which examples


def test_shards_part_the_examples_and_more_examples_leave_each_where_it_was() -> None:
    for n in (8, 20):
        parts = [list(Shard(i, 8).positions(n)) for i in range(1, 9)]
        assert sorted(sum(parts, [])) == list(range(n))
        for i, part in enumerate(parts):
            assert part[: len(range(i, 8, 8))] == list(range(i, 8, 8))


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/4", "-1/4", "1/0", "1/2/3", "", "/", "1.0/2"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected I/N"):
        read_shard(text)


def test_a_shard_has_one_spelling() -> None:
    assert parse_shard("03/08") == "3/8"


# ---- the same report


@pytest.fixture(scope="module")
def alone(calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(calibrated, tmp_path_factory.mktemp("alone") / "run"))
    assert evaluate(folder).exit_code == 0
    return folder


def test_shards_and_then_the_whole_give_the_report_of_one_job(run: Path, alone: Path) -> None:
    for i in (3, 1):  # in any order, and one of them left to the command that gathers
        done = evaluate(run, "--shard", f"{i}/3")
        assert done.exit_code == 0, done.stderr
        assert Path(done.stdout.strip()) == run / "shards" / f"shard-{i}-of-3" / "evaluate.yaml"
        assert "without --shard" in said(done)
    n_before = len(list((run / "state").rglob("*.pt")))
    missing = evaluate(run)
    words = said(missing)
    assert missing.exit_code == 10 and "shard 2/3: 8 of 8 examples are not done; never begun in this folder" in words
    assert "--shard 2/3" in words and "--finish" in words and "shard 1/3" not in words
    assert len(list((run / "state").rglob("*.pt"))) <= n_before + 1  # no attack, the digests of all examples at most
    done = evaluate(run, "--finish")
    assert done.exit_code == 0, done.stderr
    assert results(run) == results(alone)
    assert results(run)["n_examples"] == N
    assert (run / "outcomes.npz").read_bytes() == (alone / "outcomes.npz").read_bytes()
    files = sorted((run / "state").rglob("*.pt"))
    of_whole = [
        file
        for file in files
        if not file.name.startswith("shard-") and file.parent.parent.name in ("base", "sparsified")
    ]
    assert len(files) > n_before
    for file in of_whole:  # what shards had done was not done again
        import torch

        assert all(position % 3 == 1 for position in torch.load(file)["positions"].tolist()), file


def test_a_shard_s_own_report_is_of_its_own_examples(run: Path, alone: Path) -> None:
    assert evaluate(run, "--shard", "2/3").exit_code == 0
    with np.load(run / "shards" / "shard-2-of-3" / "outcomes.npz") as part, np.load(alone / "outcomes.npz") as whole:
        for key in (
            "index",
            "base_outcome",
            "sparsified_outcome",
            "base_first_broken_by",
            "sparsified_first_broken_by",
        ):
            assert (part[key] == whole[key][1::3]).all(), key


def test_shards_of_more_examples_attack_only_the_new_ones(run: Path) -> None:
    assert evaluate(run, "--shard", "1/4", "--n-examples", "8").exit_code == 0
    before = {file: file.read_bytes() for file in (run / "state").rglob("[0-9s]*-0*.pt")}
    done = evaluate(run, "--shard", "1/4", "--n-examples", "20")
    assert done.exit_code == 0, done.stderr
    assert "(n_examples: 8 -> 20); what is done of it is kept" in said(done)
    assert before and all(file.read_bytes() == content for file, content in before.items())
    assert results(run / "shards" / "shard-1-of-4")["n_examples"] == 5


def test_shards_at_work_together_one_of_them_killed(run: Path, alone: Path) -> None:
    def start(i: int) -> "subprocess.Popen[bytes]":
        command = [
            sys.executable,
            "-m",
            "meansparse_cli",
            "evaluate",
            "--run",
            str(run),
            *OPTIONS,
            "--shard",
            f"{i}/2",
            "--batch-size",
            "4",
        ]
        return subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "SLOW": "0.01"},
        )

    first, second = start(1), start(2)
    until = time.monotonic() + 120
    while not list((run / "state" / "evaluate" / "base" / "pgd-60").glob("shard-2-of-2-*.pt")):
        assert time.monotonic() < until and second.poll() is None
        time.sleep(0.01)
    second.send_signal(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    assert first.wait() == 0
    assert evaluate(run, "--shard", "2/2", "--batch-size", "4").exit_code == 0
    done = evaluate(run)
    assert done.exit_code == 0, done.stderr
    assert results(run) == results(alone)


# ---- what is refused


def test_the_whole_waits_for_its_shards_and_each_shard_is_at_work_once(run: Path) -> None:
    with run_folder_lock(run, shared=True), run_folder_lock(run / "shards" / "shard-1-of-2"):
        for more in ([], ["--shard", "1/2"]):
            refused = evaluate(run, *more)
            assert refused.exit_code == 10 and "another command is at work" in said(refused)
        assert evaluate(run, "--shard", "2/2").exit_code == 0
    with run_folder_lock(run):
        assert evaluate(run, "--shard", "2/2").exit_code == 10


def test_a_network_folder_locks_what_is_open_for_reading_and_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    flock = fcntl.flock

    def like_nfs(handle: Any, how: int) -> None:  # which turns flock into a lock of fcntl, with what that asks for
        mode = fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE
        if mode != os.O_RDWR and mode != (os.O_RDONLY if how & fcntl.LOCK_SH else os.O_WRONLY):
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", like_nfs)
    refused = pytest.raises(ArtifactError, match="another command is at work")
    with run_folder_lock(tmp_path, shared=True), run_folder_lock(tmp_path, shared=True), refused:
        run_folder_lock(tmp_path).__enter__()
    with run_folder_lock(tmp_path):
        pass


def test_a_file_system_without_locks_gets_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(handle: Any, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with run_folder_lock(tmp_path):
        pass
    assert "cannot be locked (Function not implemented)" in said(capsys.readouterr().err)


def test_other_settings_than_those_of_the_other_shards_are_refused(run: Path) -> None:
    assert evaluate(run, "--shard", "1/2").exit_code == 0
    refused = evaluate(run, "--shard", "2/2", "--seed", "7")
    assert refused.exit_code == 10 and "seed: 0 -> 7" in said(refused)


def test_more_shards_than_examples_are_refused(run: Path) -> None:
    refused = evaluate(run, "--shard", "1/99")
    assert refused.exit_code == 3 and "23 examples cannot be shared by 99 shards" in said(refused)
    refused = evaluate(run, "--shard", "3/2")
    assert refused.exit_code == 3 and "expected I/N" in said(refused)


def test_shards_of_other_settings_put_together_are_refused_by_the_command_that_gathers(
    run: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(run, elsewhere)
    assert evaluate(run, "--shard", "1/2").exit_code == 0
    assert evaluate(elsewhere, "--shard", "2/2", "--eps", "0.03").exit_code == 0
    shutil.copytree(elsewhere, run, dirs_exist_ok=True)
    refused = evaluate(run)
    words = said(refused)
    assert refused.exit_code == 10 and "shard-2-of-2 in" in words and "eps: 0.03 -> 0.06" in words
    assert "--shard 2/2 --fresh" in words
    assert not (run / "evaluate.yaml").exists()
    assert evaluate(run, "--shard", "2/2", "--fresh").exit_code == 0
    assert evaluate(run).exit_code == 0


def test_outcomes_without_the_settings_of_their_shard_are_refused(run: Path) -> None:
    assert evaluate(run, "--shard", "1/2").exit_code == 0
    for name in ("shard-1-of-2-settings.json", "shard-1-of-2-settings.json.copy"):
        (run / "state" / "evaluate" / name).unlink()
    refused = evaluate(run)
    assert refused.exit_code == 10 and "no shard-1-of-2-settings.json" in said(refused)


def test_a_shard_of_another_split_is_refused_at_once(run: Path) -> None:
    assert evaluate(run, "--shard", "1/2").exit_code == 0
    refused = evaluate(run, "--shard", "2/2", "--split", "held-out")
    assert refused.exit_code == 10 and "split: test -> held-out" in said(refused)


def test_whoever_gathers_takes_over_a_precision_that_was_left_to_the_device(run: Path) -> None:
    """The shards ran on GPUs, in TF32; the command that gathers is typed where there is none."""
    for i in (1, 2):
        assert evaluate(run, "--shard", f"{i}/2", "--precision", "tf32").exit_code == 0
    n_before = len(list((run / "state").rglob("shard-*.pt")))
    done = evaluate(run, "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    assert results(run)["search"]["precision"] == "tf32"
    assert len(list((run / "state").rglob("shard-*.pt"))) == n_before
    assert "already done" in said(evaluate(run))
    refused = evaluate(run, "--precision", "fp32")
    assert refused.exit_code == 10 and "precision: tf32 -> fp32" in said(refused)


def test_fresh_does_one_shard_again_and_leaves_the_others(run: Path, alone: Path) -> None:
    for i in (1, 2):
        assert evaluate(run, "--shard", f"{i}/2").exit_code == 0
    state = run / "state" / "evaluate"
    of_first, of_second = (
        {file: (file.stat().st_ino, file.read_bytes()) for file in state.rglob(f"shard-{i}-of-2-0*.pt")} for i in (1, 2)
    )
    assert evaluate(run, "--shard", "2/2", "--fresh").exit_code == 0
    assert of_first and all((file.stat().st_ino, file.read_bytes()) == before for file, before in of_first.items())
    assert of_second and all(file.stat().st_mtime >= max(f.stat().st_mtime for f in of_first) for file in of_second)
    assert evaluate(run).exit_code == 0
    assert results(run) == results(alone)
    done = evaluate(run, "--fresh")
    assert done.exit_code == 0 and not (run / "shards").exists() and not list(state.rglob("shard-*"))


def test_a_shard_whose_state_is_gone_is_done_again(run: Path) -> None:
    assert evaluate(run, "--shard", "1/2").exit_code == 0
    assert "already done" in said(evaluate(run, "--shard", "1/2"))
    state = run / "state" / "evaluate"
    chunk = next(iter((state / "base" / "pgd-60").glob("*.pt")))
    chunk.unlink()
    done = evaluate(run, "--shard", "1/2")
    assert done.exit_code == 0 and "1 of the files that shard 1/2 wrote" in said(done)
    assert chunk.exists()
    shutil.rmtree(state)
    assert evaluate(run, "--shard", "1/2").exit_code == 0 and chunk.exists()


def test_a_named_evaluation_has_shards_of_its_own(run: Path) -> None:
    done = evaluate(run, "--name", "other", "--shard", "1/2", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["config"]["settings"]["shard"] == "1/2"
    assert (run / "evaluations" / "other" / "shards" / "shard-1-of-2" / "evaluate.yaml").exists()
    edited = run / "evaluations" / "other" / "shards" / "shard-1-of-2" / "evaluate.yaml"
    edited.write_text(edited.read_text().replace("n_examples: 23", "n_examples: 24"))
    refused = CliRunner().invoke(app, ["report", str(edited.parent)])
    assert refused.exit_code == 10 and "--name other --shard 1/2" in said(refused)
    mended = evaluate(run, "--name", "other", "--shard", "1/2")
    assert mended.exit_code == 0 and "put back from its copy" in said(mended)


@pytest.mark.parametrize(
    ("job", "shard"),
    [
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "8"}, "3/8"),
        ({"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "2"}, "1/2"),
        (
            {
                "SLURM_ARRAY_TASK_ID": "6",
                "SLURM_ARRAY_TASK_MIN": "2",
                "SLURM_ARRAY_TASK_STEP": "4",
                "SLURM_ARRAY_TASK_COUNT": "3",
            },
            "2/3",
        ),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "1/4"),
        (
            {
                "SLURM_ARRAY_TASK_ID": "2",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_COUNT": "2",
                "RANK": "3",
                "WORLD_SIZE": "4",
            },
            "8/8",
        ),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "1"}, "1/1"),
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "1/1"),
        ({"RANK": "0"}, None),
        ({"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_COUNT": "8"}, None),
    ],
)
def test_which_shard_this_job_is(job: dict[str, str], shard: str | None) -> None:
    if shard is None:
        with pytest.raises(ValueError, match="shard is auto"):
            shard_of_job(job)
    else:
        assert shard_of_job(job) == read_shard(shard)
