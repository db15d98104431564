"""``meansparse train`` by several workers: one gradient of all, the same weights however they are started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from meansparse_cli.cli import app
from meansparse_cli.files import load_torch
from meansparse_cli.training import ranks

TRAIN = (
    "train --width 4 --n-steps 1 --batch-size 25 --crop-padding 1 --held-out-examples 13 --epochs 2 --device cpu "
    "--n-examples 200 --test-examples 40"
)
ALONE = [sys.executable, "-m", "meansparse_cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]  # a port of its own
RANKS = """
import copy, gc, sys, torch, torch.distributed as distributed
from pathlib import Path
from torch import nn
from meansparse_cli.errors import ArtifactError
from meansparse_cli.settings.training import TrainConfig
from meansparse_cli.training.images import TrainingData
from meansparse_cli.training.ranks import average_over_ranks, check_all_alike, shared, weight_of
from meansparse_cli.training.train import train_model

distributed.init_process_group("gloo")
rank, world = distributed.get_rank(), distributed.get_world_size()
torch.manual_seed(rank)
model = nn.Linear(4, 3).double()
learner = shared(model)
torch.manual_seed(7)
x, y = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])
alone = copy.deepcopy(model)
mine = slice(rank, None, world)
(nn.functional.cross_entropy(learner(x[mine]), y[mine]) * weight_of(len(x[mine]), 5)).backward()
nn.functional.cross_entropy(alone(x), y).backward()
torch.testing.assert_close(model.weight.grad, alone.weight.grad, rtol=1e-12, atol=1e-12)
mean = torch.tensor(float(rank))
average_over_ranks([mean, whole := torch.tensor(rank)])
assert mean == (world - 1) / 2 and whole == rank
check_all_alike(4, "cpu")
try:
    check_all_alike(3 * rank, "cpu")  # as ranks do that see other folders
    raise AssertionError
except ArtifactError as error:
    assert "0 to 3 epochs are done" in str(error), error

generator = torch.Generator().manual_seed(0)
pixels = torch.randint(0, 256, (60, 8, 8, 1), generator=generator, dtype=torch.uint8), torch.arange(60) % 10
config = TrainConfig(method=sys.argv[1], width=8, n_steps=1, epochs=2, batch_size=20, eps="0.1", crop_padding=1,
                     mean_sparse_alpha=0.2)
data = TrainingData(pixels, tuple(part[:20] for part in pixels), 10, "images")
whole, _ = train_model(config, data, Path("whole"), device="cpu")
_, log = train_model(config, data, Path("stopped"), device="cpu", deadline=0.0)
assert len(log) == 1
model, log = train_model(config, data, Path("stopped"), device="cpu")
assert len(log) == 2
for name, tensor in whole.state_dict().items():
    assert torch.equal(model.state_dict()[name], tensor), name
for name, tensor in model.state_dict().items():
    if name.endswith(("num_batches_tracked", "n_batches")):
        continue
    all_of_them = [torch.empty_like(tensor) for _ in range(world)]
    distributed.all_gather(all_of_them, tensor.contiguous())
    assert all(torch.equal(one, tensor) for one in all_of_them), name
    if name.endswith(".std"):
        torch.testing.assert_close(tensor, model.get_buffer(name[:-3] + "variance").sqrt())
del learner
gc.collect()
distributed.destroy_process_group()
"""


def typed(words: list[str], folder: Path, code: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    result = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == code, f"{words}: {result.returncode}\n{result.stdout}{result.stderr}"
    return " ".join((result.stdout + result.stderr).replace("│", " ").split())


@pytest.mark.parametrize("method", ["pgd", pytest.param("trades", marks=pytest.mark.slow)])
def test_ranks_make_the_gradient_of_the_batch_and_end_with_one_network(method: str, tmp_path: Path) -> None:
    """Stopped after an epoch or not; ranks that see other folders are refused."""
    (tmp_path / "one.py").write_text(RANKS)
    typed([*TORCHRUN, "2", "one.py", method], tmp_path)


def test_one_process_is_all_ranks() -> None:
    assert ranks.rank_and_world() == (0, 1) and ranks.weight_of(7, 7) == 1 and ranks.first_decides(True, "cpu")


def same_weights(folder: Path, one: str, other: str) -> bool:
    mine, theirs = (load_file(folder / run / "model.safetensors") for run in (one, other))
    return mine.keys() == theirs.keys() and all((mine[key] == theirs[key]).all() for key in mine)


def test_jobs_and_torchrun_end_in_the_same_weights(npz: Path, tmp_path: Path) -> None:
    few = ["--dataset", str(npz), "--n-examples", "80", "--test-examples", "12"]
    words = [*TRAIN.split(), *few, "--ema", "0.9"]
    said = typed([*TORCHRUN, "2", "-m", "meansparse_cli", *words, "--run-dir", "torchrun"], tmp_path)
    assert said.count("epoch 1 of 2: loss") == 1  # by the first rank alone
    jobs = [*words, "--run", str(tmp_path / "jobs"), "--jobs", "2"]
    assert CliRunner().invoke(app, jobs).exit_code == 0
    assert same_weights(tmp_path, "torchrun", "jobs")
    report = yaml.safe_load((tmp_path / "jobs" / "train.yaml").read_text())
    assert len(report["results"]["epochs"]) == 2 and "jobs" not in report["config"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_jobs_and_torchrun_end_in_the_same_weights_also_after_a_stop(method: str, tmp_path: Path) -> None:
    words = [*TRAIN.split(), "--method", method, "--ema", "0.9"]
    said = typed([*ALONE, *words, "--run", "jobs", "--jobs", "2"], tmp_path)
    assert said.count("epoch 1 of 2: loss") == 1  # by the first worker alone
    stopped = typed(
        [*TORCHRUN, "2", "-m", "meansparse_cli", *words, "--run-dir", "r", "--time-limit", "1e-4"], tmp_path, 1
    )
    assert "stopped at the time limit after epoch 1 of 2" in stopped
    assert len(load_torch(tmp_path / "r" / "train-state.pt")["log"]) == 1
    went_on = typed([*TORCHRUN, "2", "-m", "meansparse_cli", *words, "--run-dir", "r"], tmp_path)
    assert "epoch 1 of 2: loss" not in went_on and went_on.count("epoch 2 of 2: loss") == 1
    assert same_weights(tmp_path, "jobs", "r")
    report = yaml.safe_load((tmp_path / "jobs" / "train.yaml").read_text())
    assert len(report["results"]["epochs"]) == 2 and "jobs" not in report["config"]


@pytest.mark.slow
def test_another_number_of_workers_goes_on(tmp_path: Path) -> None:
    words = [*ALONE, *TRAIN.split(), "--run", "r"]
    typed([*words, "--jobs", "2", "--time-limit", "1e-4"], tmp_path, 75)
    went_on = typed([*words, "--jobs", "3"], tmp_path)
    assert "epoch 2 of 2: loss" in went_on and "epoch 1 of 2: loss" not in went_on
    refused = typed([*words, "--fresh", "--jobs", "13"], tmp_path, 3)
    assert "13 workers share a batch of 25 images" in refused
    assert (tmp_path / "r" / "train.yaml").exists()
