"""``meansparse train`` as it is typed: killed and typed again, limited, refused, and what it leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import Subset
from typer.testing import CliRunner, Result

from meansparse_cli.cli import app
from meansparse_cli.data.read import FileImages
from meansparse_cli.data.splits import load_split
from meansparse_cli.errors import DataError
from meansparse_cli.files import load_torch, save_torch
from meansparse_cli.models.networks import ACTIVATIONS
from meansparse_cli.models.source import load_model, resolve_model
from meansparse_cli.settings.resolve import resolve
from meansparse_cli.settings.training import TrainConfig
from meansparse_cli.training.attack import pgd_outcomes
from meansparse_cli.training.images import read_pixels
from meansparse_cli.training.plan import with_preset
from tests.conftest import said

QUICK = ["--width", "2", "--n-steps", "1", "--batch-size", "24", "--crop-padding", "1", "--held-out-examples", "12"]


def train(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *QUICK, *arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((folder / "train.yaml").read_text())
    return content


KILLED_ONCE_THERE = """
import os, signal, sys, threading, time

def kill():
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)

from meansparse_cli.cli import app
threading.Thread(target=kill, daemon=True).start()
app(sys.argv[2:])
"""
"""A command that kills itself as soon as a file is there.

From within, so that a machine busy with other things delays the blow as it delays the command. In a process of its
own, not in a forked one: whoever has run a backward pass has threads that no fork takes along.
"""


def test_killed_in_mid_epoch_it_ends_in_the_same_weights(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("robustbench", "autoattack", "pyautoattack", "timm"):
        monkeypatch.setitem(sys.modules, name, None)  # importing what training does not need fails
    options = ["--dataset", str(npz), "--epochs", "3", "--activation", "pssilu", "--ema", "0.9", "--n-steps", "8"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert train(*options, "--run", str(whole)).exit_code == 0
    state = killed / "train-state.pt"
    words = [sys.executable, "-c", KILLED_ONCE_THERE, str(state), "train", *QUICK, *options, "--run", str(killed)]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert 1 <= len(load_torch(state)["log"]) < 3
    assert not (killed / "model.safetensors").exists()
    result = train(*options, "--run", str(killed))
    assert (result.exit_code, result.stdout.strip()) == (0, str(killed / "model.safetensors")), result.output
    a, b = load_file(killed / "model.safetensors"), load_file(whole / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    losses = [[row["train_loss"] for row in report(folder)["results"]["epochs"]] for folder in (killed, whole)]
    assert losses[0] == losses[1]


def test_what_it_leaves(npz: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["--dataset", str(npz), "--epochs", "2", "--run", str(run), "--save-dtype", "float16"]
    result = train(*arguments)
    assert result.exit_code == 0, result.output
    weights = run / "model.safetensors"
    assert result.stdout.strip() == str(weights)
    assert {"model.safetensors", "train.yaml", "train.png", "train.svg"} <= {p.name for p in run.iterdir()}
    results = report(run)["results"]
    assert results["selected_on"] == "held-out"
    assert len(results["epochs"]) == 2
    assert results["test_accuracy"]["n"] == results["test_pgd20_accuracy"]["n"] == 12
    assert {t.dtype for t in load_file(weights).values()} == {torch.float16, torch.int64}
    # the accuracy that is reported is that of the rounded weights in the file
    model = load_model(resolve_model(str(weights)))
    pixels, labels = read_pixels(load_split(str(npz), None, "test"))
    clean, robust = pgd_outcomes(model, pixels, labels, eps=8 / 255, n_steps=20, device="cpu")
    assert int(clean.sum()) == round(12 * results["test_accuracy"]["fraction"])
    assert int(robust.sum()) == round(12 * results["test_pgd20_accuracy"]["fraction"])
    with safe_open(weights, "pt") as file:
        training = json.loads(file.metadata()["training"])
    assert training["test_pgd20_accuracy"] == results["test_pgd20_accuracy"]
    before = weights.stat().st_mtime_ns
    again = train(*arguments)
    assert (again.exit_code, weights.stat().st_mtime_ns) == (0, before)
    assert "done before" in said(again)
    other = train(*arguments, "--lr", "0.3")
    assert (other.exit_code, "lr: 0.1 -> 0.3" in said(other)) == (10, True), other.stderr
    fresh = train(*arguments, "--lr", "0.3", "--fresh", "--json")
    assert json.loads(fresh.stdout)["config"]["lr"] == {"value": 0.3, "source": "flag"}


def test_only_paper_selection_sees_test_images_before_the_end(npz: Path, tmp_path: Path) -> None:
    found = {}
    for name, option in (("own", []), ("paper", ["--paper-selection"])):
        result = train("--dataset", str(npz), "--epochs", "1", "--run", str(tmp_path / name), *option)
        assert result.exit_code == 0, result.output
        assert ("chosen on test images" in said(result)) == (name == "paper")
        found[name] = report(tmp_path / name)["results"]
    assert (found["own"]["selected_on"], found["paper"]["selected_on"]) == ("held-out", "test")
    # the paper trains on everything that is not the test set; batches of 24, so that 108 images are 4 of them as well
    assert (found["own"]["n_train_examples"], found["paper"]["n_train_examples"]) == (96, 108)
    # the log's accuracy is that of the split it was chosen on, and by default that is the whole test set
    assert found["paper"]["epochs"][0]["selection_accuracy"] == found["paper"]["test_accuracy"]["fraction"]
    options = ["--epochs", "1", "--run", str(tmp_path / "all"), "--paper-selection"]
    whole = CliRunner().invoke(app, ["train", "--dataset", str(npz), *QUICK[:-2], *options])
    assert whole.exit_code == 0 and report(tmp_path / "all")["config"]["held_out_examples"]["value"] == 12
    network = load_model(resolve_model(str(tmp_path / "own" / "model.safetensors")))
    clean, _ = pgd_outcomes(
        network, *read_pixels(load_split(str(npz), None, "held-out")), eps=8 / 255, n_steps=1, device="cpu"
    )
    assert found["own"]["epochs"][0]["selection_accuracy"] == int(clean.sum()) / 12


def test_a_run_of_another_version_is_refused_in_words(npz: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", str(npz), "--epochs", "2", "--run", str(tmp_path / "r")]
    assert train(*arguments, "--time-limit", "0.00001").exit_code == 75
    file = next((tmp_path / "r").glob("*.pt"))
    state = load_torch(file)
    for row in state["log"]:
        row["held_out_accuracy"] = row.pop("selection_accuracy")
    save_torch(file, state)
    refused = train(*arguments)
    words = said(refused)
    assert refused.exit_code == 10 and "was begun by another version" in words and "--fresh" in words


def test_the_time_limit_stops_between_epochs_and_the_same_command_goes_on(npz: Path, tmp_path: Path) -> None:
    arguments = ["--dataset", str(npz), "--epochs", "3", "--run", str(tmp_path / "r")]
    stopped = train(*arguments, "--time-limit", "0.00001")
    assert (stopped.exit_code, stopped.stdout) == (75, "")
    assert "after epoch 1 of 3" in said(stopped)
    assert train(*arguments).exit_code == 0
    assert train(*arguments[:-1], str(tmp_path / "whole")).exit_code == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("r", "whole"))
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--activation", "tanh"], 3, "--activation"),
        (["--method", "fgsm"], 3, "'pgd', 'trades' or 'standard'"),
        (["--n-steps", "0"], 3, "--n-steps"),
        (["--eps", "8"], 3, "did you mean --eps 8/255?"),
        (["--ema", "1"], 3, "--ema"),
        (["--device", "cpu", "--cuda-graphs"], 3, "--cuda-graphs on cpu"),
        (["--mean-sparse-ramp", "3"], 3, "without --mean-sparse-alpha"),
        (["--mean-sparse-alpha", "0.2", "--mean-sparse-ramp", "9", "--epochs", "3"], 3, "more than the 3 epochs"),
        (["--dataset", "cifar10"], 7, "--data-dir"),
        (["--n-examples", "5000"], 7, "5000 examples were asked for"),
        (["--n-examples", "1"], 3, "raise --n-examples"),
        (["--batch-size", "1"], 3, "raise --batch-size"),
        (["--fresh", "--time-limit", "5"], 3, "would begin anew each time"),
        (["--config", "nowhere.yaml"], 3, "no config file nowhere.yaml"),
    ],
)
def test_bad_input(
    arguments: list[str], code: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = train(*arguments)
    assert expected in said(result), result.output
    assert (result.exit_code, result.stdout) == (code, "")


def test_too_few_images_to_hold_any_out(tmp_path: Path) -> None:
    for part in ("train", "test"):
        np.savez(tmp_path / f"{part}.npz", x=np.zeros((8, 8, 8, 3), np.uint8), y=np.arange(8) % 2)
    result = train("--dataset", str(tmp_path), "--epochs", "1", "--run", str(tmp_path / "r"))
    assert (result.exit_code, "--paper-selection" in result.stderr) == (7, True)


def test_fresh_takes_the_old_weights_away_before_it_trains(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at once it must not leave them there: `make` would take them for what was asked."""
    arguments = ["--dataset", str(npz), "--epochs", "1", "--run", str(tmp_path / "r")]
    assert train(*arguments).exit_code == 0
    (tmp_path / "r" / "train.png").unlink()
    missing = train(*arguments)
    assert missing.exit_code == 10 and "--fresh" in missing.stderr

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("meansparse_cli.stages.train.train_model", stop)
    monkeypatch.setattr("sys.argv", ["meansparse", "train", *arguments, "--fresh"])
    killed = train(*arguments, "--fresh")
    assert killed.exit_code == 130 and "the same command without --fresh goes on" in said(killed)
    assert not (tmp_path / "r" / "model.safetensors").exists()


def test_decoding_refuses_one_set_of_images(npz: Path, tmp_path: Path) -> None:
    """Its test images would be among the training images."""
    np.savez(tmp_path / "all.npz", x=np.zeros((40, 8, 8, 3), np.uint8), y=np.arange(40) % 4)
    script = Path(__file__).parents[1] / "benchmarks" / "images_to_npz.py"

    def decode(dataset: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), str(dataset), str(tmp_path), str(tmp_path / "decoded")]
        return subprocess.run(command, capture_output=True, text=True)

    refused = decode(tmp_path / "all.npz")
    assert refused.returncode == 1 and "one set of images" in said(refused) and not (tmp_path / "decoded").exists()
    pair = tmp_path / "pair"
    pair.mkdir()
    for part in ("train", "test"):
        shutil.copy(npz, pair / f"{part}.npz")
    assert decode(pair).returncode == 0 and (tmp_path / "decoded" / "test.npz").exists()


def test_a_state_that_is_damaged_is_named_and_set_aside(
    npz: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "train-state.pt").write_bytes(b"PK\x03\x04 half of a file")
    result = train("--dataset", str(npz), "--epochs", "1", "--run", str(tmp_path / "r"))
    assert (result.exit_code, "train-state.pt is damaged: set aside" in caplog.text) == (0, True)
    assert (tmp_path / "r" / "train-state.pt.damaged").read_bytes().endswith(b"half of a file")
    (tmp_path / "r" / "model.safetensors").unlink()
    save_torch(tmp_path / "r" / "train-state.pt", {"settings": {}})
    assert train("--dataset", str(npz), "--epochs", "1", "--run", str(tmp_path / "r"), "--fresh").exit_code == 0


def test_flags_win_over_the_file_over_the_preset_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("batch_size: 64\ntrain: {preset: short, epochs: 12, width: 8}\n")
    config, sources = resolve("train", TrainConfig, file, {"width": 32})
    config = with_preset(config, sources)
    assert (config.width, config.epochs, config.schedule, config.lr, config.batch_size) == (
        32,
        12,
        "one-cycle",
        0.2,
        64,
    )
    assert (sources["width"], sources["epochs"], sources["schedule"], sources["momentum"]) == (
        "flag",
        str(file),
        "preset short",
        "default",
    )
    plain, sources = resolve("train", TrainConfig, None, {})
    assert with_preset(plain, sources) == plain
    assert (plain.epochs, plain.batch_size, plain.lr, plain.momentum, plain.weight_decay) == (200, 256, 0.1, 0.9, 5e-4)
    assert (plain.n_steps, plain.step_size, plain.schedule) == (10, "0.0078", "steps")


def test_the_shipped_configs() -> None:
    folder = Path(__file__).parent.parent / "configs"
    for file in folder.glob("*.yaml"):
        resolve("train", TrainConfig, file, {})
    paper = with_preset(*resolve("train", TrainConfig, folder / "train-resnet18-paper.yaml", {}))
    assert paper == TrainConfig(dataset="cifar10", eps="8/255")
    short = with_preset(*resolve("train", TrainConfig, folder / "train-resnet18-short.yaml", {}))
    assert (short.epochs, short.precision, short.cuda_graphs) == (30, "bf16", True)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("n_workers", [0, 2])
def test_images_are_read_in_order(tmp_path: Path, n_workers: int) -> None:
    expected = []
    for i in range(150):
        pixels = np.random.default_rng(i).integers(0, 256, (4, 5, 3)).astype(np.uint8)
        path = tmp_path / "abc"[i // 50] / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
        expected.append(pixels)
    images = FileImages(tmp_path)
    counted: list[int] = []
    x, y = read_pixels(Subset(images, range(149, -1, -1)), n_workers, counted.append)
    assert torch.equal(x, torch.from_numpy(np.stack(expected[::-1])))
    assert y.tolist() == sorted((i // 50 for i in range(150)), reverse=True)
    assert sum(counted) == 150
    Image.fromarray(np.zeros((3, 3, 3), np.uint8)).save(tmp_path / "a" / "small.png")
    images = FileImages(tmp_path)
    with pytest.raises(DataError, match="several sizes"):
        read_pixels(Subset(images, range(len(images))), n_workers)


SUITE = Path(__file__).parent.parent / "benchmarks" / "gpu_suite.sh"


def test_the_gpu_suite_types_what_the_tool_takes(tmp_path: Path) -> None:
    stub = tmp_path / "stub"
    stub.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *silu*) exit 75;; esac\necho "train: test clean 1.00 %"\n')
    stub.chmod(0o755)
    settings = {"DATA": "d", "OUT": str(tmp_path), "MEANSPARSE": str(stub), "TRAIN_IMAGES": "512"}
    done = subprocess.run(
        [SUITE, "embedded", "activations", "methods", "finish", "wide"],
        env=os.environ | settings,
        capture_output=True,
        text=True,
    )
    logs = {path.stem: path.read_text().split("\n")[0].split() for path in tmp_path.glob("*.log")}
    assert len(logs) == 9
    unfinished = [name for name in logs if "silu" in name]
    assert done.returncode == len(unfinished) == 3
    assert done.stdout.count("not finished (exit code 75)") == 3
    assert done.stdout.count("test clean 1.00 %") == 6
    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    for name, (word, *arguments) in logs.items():
        assert word == "train"
        flags = command.make_context("train", arguments).params
        config, sources = resolve("train", TrainConfig, None, flags)
        config = with_preset(config, sources)
        assert (str(config.run), config.n_examples, config.epochs) == (str(tmp_path / name), 512, 30)
        assert name.startswith(f"{config.method}-{config.activation}-w{config.width}")
    assert subprocess.run([SUITE, "typo"], env=os.environ | settings, capture_output=True).returncode == 2


def test_the_gpu_suite_makes_the_tables_of_what_it_trained(tmp_path: Path) -> None:
    stub = tmp_path / "make"
    stub.write_text(
        '#!/bin/sh\necho "$@"\necho "SPEED=$SPEED"\ncase "$*" in *table2*) echo "make: a sad end"; exit 2;; esac\n'
    )
    stub.chmod(0o755)
    settings = {
        "DATA": "d",
        "OUT": str(tmp_path),
        "MEANSPARSE": "meansparse",
        "TRAIN_IMAGES": "512",
        "SPEED": "--compile",
        "N": "20",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "TABLE_OPTIONS": "QUICK=1 DATA_NOTE='two words'",
    }
    done = subprocess.run([SUITE, "tables", "trained"], env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 1 and "no pgd-gelu-w16 pgd-relu-w16 pgd-elu-w16" in done.stdout
    for name in [*(f"pgd-{name}" for name in ACTIVATIONS), "trades-gelu", "standard-gelu"]:
        (tmp_path / f"{name}-w16").mkdir()
        (tmp_path / f"{name}-w16" / "model.safetensors").touch()
    done = subprocess.run([SUITE, "trained"], env=os.environ | settings, capture_output=True, text=True)
    first, speed, second, *_ = (tmp_path / "tables.log").read_text().splitlines()
    assert f"N=20 MODEL= QUICK=1 DATA_NOTE=two words MODEL={tmp_path}/pgd-gelu-w64/model.safetensors tables " in first
    assert speed == "SPEED=" and second.endswith("table2 table6 table7")
    assert done.returncode == 1 and "table2 table6 table7: not finished: " in done.stdout


@pytest.mark.slow
def test_the_gpu_suite_at_a_toy_size(npz: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    with np.load(npz) as arrays:
        for name in ("train", "test"):
            np.savez(data / f"{name}.npz", x=arrays["x"], y=arrays["y"])
    toy = {
        "DATA": str(data),
        "OUT": str(out),
        "DEVICE": "cpu",
        "EPOCHS": "1",
        "TRAIN_IMAGES": "60",
        "WIDTH": "2",
        "SPEED": "",
        "EVAL": "12",
        "STEPS": "1",
        "MEANSPARSE": f"{sys.executable} -m meansparse_cli",
        "PYTHON": sys.executable,
        "WORKERS": "0",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([SUITE, "data", "embedded", "pack"], env=os.environ | toy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"pgd-gelu-w2", "weights.tar.aa"} <= {p.name for p in out.iterdir()}
    assert report(out / "pgd-gelu-w2")["results"]["n_train_examples"] == 60
    assert "pgd-gelu-w2: train: test clean" in done.stdout
    limited = subprocess.run(
        [SUITE, "embedded"], env=os.environ | toy | {"EPOCHS": "2"}, capture_output=True, text=True
    )
    assert (limited.returncode, "not finished (exit code 10)" in limited.stdout) == (1, True), limited.stdout
