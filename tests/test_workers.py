"""Several workers on one stage: processes of ``--jobs``, ranks of ``torchrun``, shards; the same report as one."""

import contextlib
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from meansparse_cli.cli import app
from meansparse_cli.paper.plan import plan
from meansparse_cli.settings.arguments import Reproduce
from meansparse_cli.stages import workers
from tests.conftest import write_quick_network

ALONE = [sys.executable, "-m", "meansparse_cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]  # a port of its own
STAGES = {
    "calibrate": "--model quick.py:quick --dataset digits.npz --n-examples 200 --batch-size 20",
    "sweep-alpha": "--eps 0.06 --n-examples 12 --alphas 0.4 --no-racing --block-size 4",
    "evaluate": "--eps 0.06 --n-examples 6 --alpha 0.3 --no-doubts --attack apgd-margin-30 --attack bpda-apgd-ce-30 "
    "--save-witnesses",
    "measure": "--eps 0.06 --n-examples 12 --alphas 0.3 --block-size 4 --attack none",
    "verify": "alone/witnesses.safetensors",
}
PLACES = {"measure": "measurements/grid/measure.yaml", "verify": "verify-witnesses.safetensors.yaml"}


def start(words: list[str], folder: Path, **more: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **more}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(words, cwd=folder, env=environment, **pipes)


def typed(words: list[str], folder: Path, code: int = 0) -> str:
    """What a command says, once it ended with ``code``; one of ours in this process."""
    if words[: len(ALONE)] == ALONE:
        with contextlib.chdir(folder):
            result = CliRunner().invoke(app, words[len(ALONE) :])
        said, ended = result.output, result.exit_code
    else:
        process = start(words, folder)
        said, ended = "".join(process.communicate(timeout=240)), process.returncode
    assert ended == code, f"{words}: {ended}\n{said}"
    return " ".join(said.replace("│", " ").split())


def stage(name: str, run: str, *more: str, front: list[str] | None = None) -> list[str]:
    return [*(front or ALONE), name, "--run-dir", run, *STAGES[name].split(), *more]


def attacked(run: str, *more: str) -> list[str]:
    """A measurement that takes its time where the network does."""
    return [word if word != "none" else "apgd-ce" for word in stage("measure", run, *more)]


def report(folder: Path, name: str) -> Any:
    found = yaml.safe_load((folder / PLACES.get(name, f"{name}.yaml")).read_text())
    found["results"].pop("seconds", None)
    return {part: found[part] for part in ("inputs", "outputs", "results")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage by one process; runs of others are made beside it."""
    folder = tmp_path_factory.mktemp("workers")
    write_quick_network(folder)
    for name in STAGES:
        typed(stage(name, "alone"), folder)
    return folder


def assert_equal(folder: Path, run: str, names: Any = tuple(STAGES)) -> None:
    for name in names:
        one, several = report(folder / "alone", name), report(folder / run, name)
        assert several["results"] == one["results"], name
        assert several["outputs"] == one["outputs"], name


def in_turn(n: int, work: workers.Work, *, on_gpu: bool) -> None:
    """What processes would do at the same time, each with the work that it is sent."""
    for number in range(1, n + 1):
        pickle.loads(pickle.dumps(work))(f"{number}/{n}")


@pytest.mark.parametrize("in_processes", [("evaluate",), pytest.param(tuple(STAGES), marks=pytest.mark.slow)], ids=len)
def test_jobs_end_in_the_same_reports(
    in_processes: tuple[str, ...], alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"jobs-{len(in_processes)}"
    for name in STAGES:
        with monkeypatch.context() as patch:
            if name not in in_processes:
                patch.setattr("meansparse_cli.stages.run.in_processes", in_turn)
            typed(stage(name, run, "--jobs", "2"), alone)
    assert_equal(alone, run)
    assert "already done" in typed(stage("sweep-alpha", run), alone)


def test_ranks_of_torchrun_end_in_the_same_report(alone: Path) -> None:
    typed(stage("calibrate", "ranks", front=[*TORCHRUN, "2", "-m", "meansparse_cli"]), alone)
    assert_equal(alone, "ranks", ("calibrate",))


@pytest.mark.slow
def test_ranks_share_each_command_of_a_table(tmp_path: Path) -> None:
    words = ["reproduce", "3", "--model", "digits", "--quick", "--n-examples", "4"]
    process = start([*TORCHRUN, "2", "-m", "meansparse_cli", *words], tmp_path)
    printed, said = process.communicate(timeout=400)
    assert process.returncode == 0 and printed == "runs/tables/pages/table3.md\n", said
    commands = [line.split()[1] for line in said.splitlines() if line.startswith("meansparse ")]
    assert commands == [step.words[0] for step in plan(Reproduce(tables=["3"], model="digits", quick=True))]
    assert said.count("measure (shard 1/2)") == commands.count("measure") > 0


def test_a_worker_that_dies_ends_the_run_and_others_go_on(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed(stage("calibrate", "killed"), alone)
    more = ("--n-examples", "20")
    process = start(attacked("killed", "--jobs", "2", *more), alone, SLOW="0.01")  # blocks take a second each
    state = alone / "killed" / "measurements" / "grid" / "state"
    until = time.monotonic() + 120
    begun = state.parent / "shards" / "shard-2-of-2" / "begun-measure.json"
    while not (begun.exists() and list(state.rglob("block-*.pt"))) and time.monotonic() < until:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    spawned = [pid for pid in map(int, children) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(spawned[-1], signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "worker 2 of 2: was ended by SIGKILL" in said, said
    assert "any number of workers" in said
    gathered = typed(attacked("killed", *more), alone, 10)
    assert re.search(r"shard 2/2: \d+ of \d+ images are not done; begun on host", gathered), gathered
    monkeypatch.setattr("meansparse_cli.stages.run.in_processes", in_turn)
    typed(attacked("killed", "--jobs", "3", *more), alone)
    typed(attacked("alone", "--name", "more", *more), alone)
    whole = yaml.safe_load((alone / "alone/measurements/more/measure.yaml").read_text())
    assert report(alone / "killed", "measure")["results"] == whole["results"]


def test_shards_are_put_together_or_finished(alone: Path) -> None:
    for name in ("calibrate", "sweep-alpha"):
        said = typed(stage(name, "shards", "--shard", "2/3"), alone)
        assert f"{name} (shard 2/3)" in said and "the command without it gathers all" in said
        missing = typed(stage(name, "shards"), alone, 10)
        assert "shard 1/3" in missing and "never begun" in missing and "--finish" in missing
        assert not (alone / "shards" / f"{name}.yaml").exists()
        typed(stage(name, "shards", "--finish"), alone)
    for number in ("1/3", "3/3"):
        typed(stage("verify", "shards", "--alpha", "0.3", "--shard", number), alone)
    other = typed(stage("verify", "shards", "--alpha", "0.3", "--spread", "site-std"), alone, 10)
    assert "other settings" in other and "statistics" in other, other
    missing = typed(stage("verify", "shards", "--alpha", "0.3"), alone, 10)
    assert "shard 2/3: 4 of 4 examples are not done" in missing and "verify alone/witnesses.safetensors" in missing
    typed(stage("verify", "shards", "--alpha", "0.3", "--finish"), alone)
    assert_equal(alone, "shards", ("calibrate", "sweep-alpha", "verify"))
    other = typed(stage("sweep-alpha", "shards", "--alphas", "0.1"), alone)  # the shards are over and done with
    assert "sweep-alpha.yaml" in other


def test_a_shared_sweep_is_done_though_it_did_not_race(alone: Path) -> None:
    typed(stage("calibrate", "racing"), alone)
    words = [word for word in stage("sweep-alpha", "racing") if word != "--no-racing"]
    for number in ("1/2", "2/2"):
        typed([*words, "--shard", number], alone)
    mark = time.time()
    typed([*words, "--shard", "1/2", "--fresh"], alone)
    again = [file for file in (alone / "racing").rglob("block-*.pt") if file.stat().st_mtime > mark]
    assert len(again) == 2  # of three blocks, those of the first shard
    typed(words, alone)
    assert report(alone / "racing", "sweep-alpha")["results"].pop("by_workers") is True
    assert "already done" in typed(words, alone)
    assert "leave --racing out" in typed([*words, "--racing", "--fresh", "--shard", "1/2"], alone, 3)


def test_a_plan_of_a_shard_begins_nothing(alone: Path) -> None:
    typed(stage("calibrate", "planned"), alone)
    typed(stage("evaluate", "planned", "--shard", "1/2", "--plan"), alone)
    assert not list((alone / "planned").rglob("begun*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shard", "1/2", "--jobs", "2"), "leave --shard out"),
        (("--jobs", "40"), "cannot be shared by so many"),
        (("--plan", "--fresh"), "throws away"),
        (("--devices", "some"), "expected all"),
        (("--devices", "all", "--device", "cpu"), "give one of them"),
        (("--time-limit", "0"), "minutes, above 0"),
        (("--time-limit", "1", "--fresh"), "would begin anew each time"),
    ],
)
def test_what_means_nothing_is_refused(words: tuple[str, ...], said: str, alone: Path) -> None:
    assert said in typed(stage("evaluate", "alone", *words), alone, 3)


def test_a_time_limit_stops_and_the_command_goes_on(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOW", "0.005")
    typed(stage("calibrate", "limited"), alone)
    words = attacked("limited", "--n-examples", "100", "--block-size", "8")
    said = typed([*words, "--time-limit", "0.08"], alone, 75)
    assert "stopped at the time limit: nothing finished was lost" in said
    assert list((alone / "limited" / "measurements" / "grid" / "state").rglob("block-*.pt"))


def test_ranks_that_do_not_meet_say_so(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in where.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(workers, "MEETING", timedelta(seconds=2))
    said = typed(stage("calibrate", "nowhere"), alone, 3)
    assert "rank 1 of 2: no other ranks at 127.0.0.1:9" in said and "--rdzv-endpoint" in said


def test_a_stage_without_shards_is_refused_under_torchrun(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert "each would do all of it" in typed([*ALONE, "run", "--model", "digits"], alone, 3)
