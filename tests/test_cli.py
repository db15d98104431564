"""The command line as its user meets it: help, and one clear message for each kind of bad input."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from meansparse_cli.cli import app
from meansparse_cli.reporting.console import console, heartbeat
from meansparse_cli.reporting.heartbeat import SECONDS_BETWEEN_LINES
from tests.conftest import said

PIPELINE = ["fetch", "calibrate", "sweep-alpha", "evaluate"]


def meansparse(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_help_lists_the_pipeline_in_order_without_torch() -> None:
    code = (
        "import sys, meansparse_cli.cli as c\ntry: c.app(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules, 'torch'\nassert 'robustbench' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"COLUMNS": "120"}
    )
    assert result.returncode == 0, result.stderr
    listed = re.findall(r"^│ ([a-z-]+) ", result.stdout, re.MULTILINE)
    assert [name for name in listed if name in PIPELINE] == PIPELINE


def test_tab_offers_models_attacks_and_configs() -> None:
    def offered(words: str) -> list[str]:
        env = os.environ | {"_MEANSPARSE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "3"}
        command = [str(Path(sys.executable).with_name("meansparse"))]
        return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout.split()

    assert offered("meansparse evaluate --attack soft-0.2") == ["soft-0.2-apgd-ce", "soft-0.2-apgd-dlr"]
    assert offered("meansparse run --config dem") == ["demo"]
    assert offered("meansparse fetch --model res") == ["resnet18-w16"]


def test_a_reader_who_has_seen_enough_ends_the_help_without_a_word() -> None:
    command = f"{Path(sys.executable).with_name('meansparse')} evaluate -h | head -1"
    env = os.environ | {"COLUMNS": "80"}
    assert subprocess.run(command, shell=True, capture_output=True, text=True, env=env).stderr == ""


def test_names_as_people_type_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()  # a folder is no config
    result = meansparse("fetch", "--config", "demo", "--norm", "l2", "--threat", "LINF")
    assert result.exit_code == 0 and result.stdout.strip() == "runs/digits-L2-digits/fetch.yaml"
    missing = meansparse("fetch", "--config", "dem")
    assert missing.exit_code == 3 and "by name: " in said(missing) and "demo" in said(missing)


def test_help_shows_what_an_option_is_when_not_given() -> None:
    def shown(command: str) -> str:
        return said(meansparse(command, "--help").stdout)

    assert re.search(r"--n-examples <int> .{,80}\[default: \(1000\)\]", shown("sweep-alpha"))
    assert re.search(r"--n-examples <int> .{,80}\[default: \(all\)\]", shown("calibrate"))
    for command in ("evaluate", "run"):
        text = shown(command)
        assert "[default: (fast)]" in text and "[default: (doubts)]" in text
        assert re.search(r"--n-examples <int> .{,80}\[default: \(all\)\]", text)
    assert "[default: (0.0005)]" in shown("train")
    assert "default" not in re.findall(r"--json <bool> .{,80}", shown("evaluate"))[0]


def test_sigterm_ends_like_ctrl_c_with_its_own_code(tmp_path: Path) -> None:
    """As a batch system ends a job; ``begun`` says that the command is in the middle of something."""
    code = "import pathlib, time\n\ndef make():\n    pathlib.Path('begun').touch()\n    time.sleep(120)\n"
    (tmp_path / "slow.py").write_text(code)
    command = [sys.executable, "-m", "meansparse_cli", "fetch", "--model", "slow.py:make"]
    job = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < until:
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        out, err = job.communicate(timeout=60)
    finally:
        job.kill()
    assert (job.returncode, out) == (143, "")
    assert "terminated: nothing finished was lost" in err and "Traceback" not in err


def test_sigusr1_ends_as_sigterm_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ends.py").write_text("import signal\n\ndef make():\n    signal.raise_signal(signal.SIGUSR1)\n")
    handler = signal.getsignal(signal.SIGUSR1)
    result = meansparse("fetch", "--model", "ends.py:make")
    assert (result.exit_code, result.stdout) == (143, "")
    assert "terminated: nothing finished was lost" in said(result) and "Traceback" not in result.stderr
    assert signal.getsignal(signal.SIGUSR1) == handler


@pytest.mark.parametrize(
    ("given", "spins"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")]
)
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given: dict[str, str], spins: str) -> None:
    code = (
        "import os, meansparse_cli.cli as c\ntry: c.app(['--version'])\nexcept SystemExit: pass\n"
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    own = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=own | given, check=True)
    assert result.stdout.splitlines()[-1] == spins


def test_a_gpu_that_is_too_small_is_said_in_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("meansparse_cli.stages.fetch.fetch", full)
    result = meansparse("fetch", "--model", "digits")
    assert result.exit_code == 12 and "--batch-size" in said(result) and "Traceback" not in result.stderr


def test_module_and_version() -> None:
    result = subprocess.run([sys.executable, "-m", "meansparse_cli", "--version"], capture_output=True, text=True)
    assert re.fullmatch(r"meansparse \d+\.\d+\.\d+( \([0-9a-f]{7,}(-dirty)?\))?\n", result.stdout)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["fetch", "--model", "Bartoldson2025"], 4, "did you mean"),
        (["fetch", "--model", "Wang2023Better"], 4, "can mean"),
        (["fetch"], 3, "no model and no run folder"),
        (["fetch", "--from-file", "nowhere.pt"], 6, "no weights at nowhere.pt"),
        (["calibrate", "--model", "digits", "--fraction", "2"], 3, "--fraction"),
        (
            ["calibrate", "--model", "digits", "--n-examples", "5000"],
            7,
            "5000 examples were asked for, the split has 1295",
        ),
        (["calibrate", "--model", "resnet18-w16"], 7, "--data-dir"),
        (["calibrate", "--model", "resnet18-w16", "--data-dir", "nowhere"], 7, "no folder nowhere"),
        (["calibrate", "--model", "digits", "--dataset", "nowhere.npz"], 7, "no such path"),
        (["calibrate", "--model", "digits", "--device", "cuda:7"], 3, "--device auto"),
        (["calibrate", "--model", "nowhere:net"], 4, "no such module"),
        (["sweep-alpha", "--model", "digits"], 10, "meansparse fetch --model digits"),
        (["sweep-alpha", "--model", "digits", "--alphas", "-0.1"], 3, "0 or above"),
        (["sweep-alpha", "--model", "digits", "--alphas", "some"], 3, "each must be a number"),
        (["evaluate", "--run", "nowhere"], 10, "no fetch.yaml in nowhere"),
        (["run", "--config", "nowhere.yaml"], 3, "no config file nowhere.yaml"),
        (["calibrate", "--model", "digits", "--run", "a-file"], 3, "a-file cannot be a run folder"),
        (["train", "--run", "a-file/below"], 3, "cannot be a run folder"),
    ],
)
def test_bad_input(
    arguments: list[str], code: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    result = meansparse(*arguments)
    assert expected in said(result), result.output
    assert result.exit_code == code
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


@pytest.fixture
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    assert meansparse("calibrate", "--model", "digits", "--run", "r", "--n-examples", "60").exit_code == 0
    return tmp_path / "r"


def test_bad_input_after_calibration(calibrated: Path, npz: Path) -> None:
    cases = [
        (["sweep-alpha", "--run", "r", "--eps", "8"], 3, "did you mean --eps 8/255?"),
        (["sweep-alpha", "--run", "r", "--attack", "apgd-cee"], 3, "did you mean apgd-ce"),
        (["sweep-alpha", "--run", "r", "--alphas", "0"], 3, "no alpha above 0"),
        (["evaluate", "--run", "r"], 10, "meansparse sweep-alpha --run r"),
        (["evaluate", "--run", "r", "--alpha", "-1"], 3, "alpha is -1"),
        (["calibrate", "--model", "resnet18-w16", "--run", "r"], 10, "is a run of digits"),
        (["calibrate", "--run", "r", "--dataset", str(npz)], 7, "images are 3 x 8 x 8, the model expects 1 x 8 x 8"),
    ]
    for arguments, code, expected in cases:
        result = meansparse(*arguments)
        assert expected in said(result), result.output
        assert result.exit_code == code


def test_corrupt_statistics_are_refused(calibrated: Path) -> None:
    file = calibrated / "statistics.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    result = meansparse("sweep-alpha", "--run", "r")
    assert result.exit_code == 10
    assert "sha256 differs" in said(result)
    assert "meansparse calibrate" in said(result)


def test_debug_shows_the_traceback() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "meansparse_cli", "--debug", "models", "--dataset", "nowhere"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "ConfigError" in result.stderr
    assert "Traceback" in result.stderr


def test_sites_shows_gates_and_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = meansparse("sites", "--model", "digits")
    assert result.exit_code == 0, result.output
    assert "17 of 17 sites chosen" in said(result)
    assert "layer4.1.act2" in result.stderr


def test_a_folder_of_one_image_is_no_calibration_split(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", x=np.zeros((1, 8, 8, 1), dtype=np.uint8), y=np.zeros(1, dtype=np.int64))
    refused = meansparse(
        "calibrate", "--model", "digits", "--dataset", str(tmp_path / "one.npz"), "--run", str(tmp_path / "run")
    )
    assert refused.exit_code == 7
    assert "the calibration split is empty" in said(refused)


def test_verbose_makes_the_log_line_come_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "every", SECONDS_BETWEEN_LINES)
    assert CliRunner().invoke(app, ["-v", "models", "--model", "digits"]).exit_code == 0
    assert heartbeat.every < SECONDS_BETWEEN_LINES / 2


def test_quiet_says_errors_and_the_result_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [sys.executable, "-m", "meansparse_cli", "-q", "fetch", "--model", "digits", "--run", "r"]
    one = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (one.returncode, one.stdout, one.stderr) == (0, "r/fetch.yaml\n", "")
    monkeypatch.setattr(console, "quiet", console.quiet)
    monkeypatch.setattr(heartbeat, "say", heartbeat.say)
    two = meansparse("-q", "fetch", "--model", "digits", "--threat", "L7")
    assert two.exit_code == 3 and "L7" in two.stderr
