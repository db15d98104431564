"""Every stage, and a make target, stopped at random moments and typed again: the same results as undisturbed.

``MEANSPARSE_DRILLS``: how often each is stopped by each signal; ``MEANSPARSE_DRILLS_SEED``: other moments.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.test_pipeline import PLAIN, hear_ctrl_c

pytestmark = pytest.mark.slow

N_STOPS = int(os.environ.get("MEANSPARSE_DRILLS", "2"))
SEED = int(os.environ.get("MEANSPARSE_DRILLS_SEED", "26"))
ROOT = Path(__file__).parent.parent
MEANSPARSE = str(Path(sys.executable).with_name("meansparse"))
TRAINED = ["--dataset", "digits", "--width", "4", "--epochs", "3", "--n-examples", "400", "--method", "standard"]
TYPED = {
    "fetch": ["--model", "digits"],
    "calibrate": ["--n-examples", "800", "--batch-size", "20"],
    "sweep-alpha": ["--n-examples", "32", "--alphas", "0.1:0.3:0.1", "--eps", "0.1", "--block-size", "8"],
    "evaluate": ["--n-examples", "6", "--attack", "standard", "--eps", "0.1", "--n-doubt-examples", "2"],
    "measure": ["--n-examples", "32", "--alphas", "0.1,0.3", "--eps", "0.1", "--attack", "apgd", "--block-size", "8"],
}
COMMANDS = {stage: [MEANSPARSE, stage, *words, "--run", "run"] for stage, words in TYPED.items()} | {
    "train": [MEANSPARSE, "train", *TRAINED, "--run", "trained"],
    "make table9": ["make", "-C", str(ROOT), "table9", "MODEL=digits", "N=4", "QUICK=1", "RUNS={here}/runs"]
    + ["OUT={here}/tables", "INSTALLED=", f"MEANSPARSE={MEANSPARSE}"],
}
SIGNALS = {signal.SIGKILL: -9, signal.SIGINT: 130, signal.SIGTERM: 143}
"""What each ends a command with."""


def start(name: str, folder: Path) -> "subprocess.Popen[bytes]":
    command = [word.format(here=folder) for word in COMMANDS[name]]
    with open(folder / "stderr.txt", "wb") as stderr:
        return subprocess.Popen(
            command,
            cwd=folder,
            start_new_session=True,
            env=PLAIN,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            preexec_fn=hear_ctrl_c,
        )


def without_times(content: Any) -> Any:
    """What is as the machine was quick or slow is left out."""
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if "seconds" not in key}
    return [without_times(value) for value in content] if isinstance(content, list) else content


def results(folder: Path) -> dict[str, Any]:
    """All that must not depend on how often anything was stopped."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if "/state/" in f"/{name}":
            continue
        if file.suffix == ".yaml" and "tables" not in name:
            found[name] = without_times(yaml.safe_load(file.read_text())["results"])
        elif file.suffix == ".npz":
            found[name] = {key: value.tolist() for key, value in np.load(file).items()}
        elif file.suffix == ".safetensors":
            found[name] = file.read_bytes()
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A folder in which everything was done, and the seconds that each took."""
    folder, seconds = tmp_path_factory.mktemp("undisturbed"), {}
    for name in COMMANDS:
        started = time.monotonic()
        assert start(name, folder).wait() == 0, (folder / "stderr.txt").read_text()
        seconds[name] = time.monotonic() - started
    return folder, seconds


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that is disturbed; how often each was stopped is printed in the end."""
    folder = tmp_path_factory.mktemp("stopped")
    yield folder
    for line in (folder / "stops.txt").read_text().splitlines():
        print(line)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_stopped_again_and_again(name: str, undisturbed: tuple[Path, dict[str, float]], stopped: Path) -> None:
    folder, seconds = undisturbed
    moments, n_stopped = random.Random(f"{SEED} {name}"), 0
    for number in moments.sample([*SIGNALS] * N_STOPS, len(SIGNALS) * N_STOPS):
        process = start(name, stopped)
        try:
            process.wait(moments.uniform(0, seconds[name]))
            break  # so little was left
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, number)
        code, said = process.wait(60), (stopped / "stderr.txt").read_text()
        assert "Traceback" not in said, said
        if not name.startswith("make"):
            assert code in (SIGNALS[number], -number, 0), said  # -number: before Python could hear of it
        n_stopped += 1
    assert start(name, stopped).wait() == 0, (stopped / "stderr.txt").read_text()
    with open(stopped / "stops.txt", "a") as file:
        file.write(f"{name}: {n_stopped} stops\n")
    mine, theirs = results(stopped), results(folder)
    assert mine and mine == {key: theirs[key] for key in mine}


def test_nothing_is_missing_in_the_end(undisturbed: tuple[Path, dict[str, float]], stopped: Path) -> None:
    assert results(stopped).keys() == results(undisturbed[0]).keys()
    report = yaml.safe_load((stopped / "run" / "evaluate.yaml").read_text())
    assert report["results"]["comparisons"][-1]["name"] == "worst case"
