"""Training with the operator in place: its averages, its schedule, and the files that come out."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from meansparse_cli.cli import app
from meansparse_cli.data.splits import load_split
from meansparse_cli.errors import ConfigError
from meansparse_cli.models.networks import ResNet18
from meansparse_cli.models.source import load_model, resolve_model
from meansparse_cli.operator.checkpoint import load_checkpoint, sparsify
from meansparse_cli.runs.report import read_report
from meansparse_cli.settings.training import TrainConfig
from meansparse_cli.training.attack import pgd_outcomes
from meansparse_cli.training.images import read_pixels
from meansparse_cli.training.operators import MovingMeanSparse, alpha_of_epoch, insert_moving_operators, ramp_epochs
from meansparse_cli.training.state import EpochResult, best_epoch


def test_statistics_are_a_plain_average_first_and_an_exponential_one_later() -> None:
    operator = MovingMeanSparse(2)
    for value in (1.0, 3.0):  # channels of constant value, and of value plus or minus 2
        x = torch.full((4, 2, 1, 1), value)
        x[::2, 1] += 2
        x[1::2, 1] -= 2
        assert torch.equal(operator(x), x)  # alpha is 0
    assert torch.allclose(operator.mean, torch.tensor([2.0, 2.0]))
    assert torch.allclose(operator.std, torch.tensor([0.0, 2.0]), atol=1e-3)
    operator.n_batches.fill_(10_000)
    operator(torch.full((4, 2, 1, 1), 12.0))
    assert torch.allclose(operator.mean, torch.tensor([2.1, 2.1]))
    before = operator.mean.clone()
    operator.eval()(torch.full((4, 2, 1, 1), 99.0))
    assert torch.equal(operator.mean, before)
    operator.set_alpha(1.0)
    assert torch.allclose(operator(torch.tensor([[2.5, 2.5], [9.0, 9.0]])), torch.tensor([[2.5, 2.1], [9.0, 9.0]]))


def test_alpha_rises_in_equal_steps() -> None:
    config = TrainConfig(mean_sparse_alpha=0.3, mean_sparse_ramp=3, epochs=5)
    assert [alpha_of_epoch(config, epoch) for epoch in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3])
    assert ramp_epochs(TrainConfig(mean_sparse_alpha=0.3, epochs=5)) == 2
    assert ramp_epochs(TrainConfig()) == 0
    with pytest.raises(ConfigError, match="more than the 2 epochs"):
        ramp_epochs(TrainConfig(mean_sparse_alpha=0.3, mean_sparse_ramp=3, epochs=2))


def test_only_epochs_of_the_full_alpha_compete() -> None:
    config = TrainConfig(mean_sparse_alpha=0.3, mean_sparse_ramp=2, epochs=4)
    rows = [EpochResult(i, 1, 0.9, robust, 1) for i, robust in enumerate([0.9, 0.3, 0.5, 0.4])]
    assert [best_epoch(rows[:n], config).epoch for n in (1, 2, 3, 4)] == [0, 1, 2, 2]


def test_an_operator_at_each_of_17_sites_leaves_the_network_what_it_was() -> None:
    model = ResNet18(n_classes=3, width=2).eval()
    x = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        before = model(x)
        insert_moving_operators(model, (3, 8, 8))
        assert sum(isinstance(m, MovingMeanSparse) for m in model.modules()) == 17
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("ema", [[], ["--ema", "0.9"]], ids=["plain", "ema"])
def test_base_and_checkpoint_together_are_the_network_that_was_measured(
    npz: Path, tmp_path: Path, ema: list[str]
) -> None:
    run = tmp_path / "run"
    options = shlex.split(
        "--width 2 --n-steps 1 --batch-size 24 --epochs 3 --mean-sparse-alpha 0.6 --mean-sparse-ramp 2"
    )
    arguments = ["train", "--dataset", str(npz), "--run", str(run), *options, *ema]
    stopped = CliRunner().invoke(app, [*arguments, "--time-limit", "0.00001"])
    assert stopped.exit_code == 75
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    results: dict[str, Any] = read_report(run / "train.yaml", "train", mend="")["results"]
    weights = load_file(run / "model.safetensors")
    assert not [key for key in weights if "mean_sparse" in key]
    checkpoint = load_checkpoint(run / "meansparse.safetensors")
    assert (len(checkpoint.sites), checkpoint.alpha, checkpoint.estimator) == (17, pytest.approx(0.6), "moving-average")
    model = sparsify(load_model(resolve_model(str(run / "model.safetensors"))), checkpoint)
    clean, robust = pgd_outcomes(
        model, *read_pixels(load_split(str(npz), None, "test")), eps=8 / 255, n_steps=20, device="cpu"
    )
    assert results["test_accuracy"]["fraction"] == pytest.approx(int(clean.sum()) / 12)
    assert results["test_pgd20_accuracy"]["fraction"] == pytest.approx(int(robust.sum()) / 12)
    assert "test_pgd20_straight_through_accuracy" in results
    x = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        assert not torch.equal(model(x), load_model(resolve_model(str(run / "model.safetensors")))(x))
    whole = CliRunner().invoke(app, [*arguments[:4], str(tmp_path / "whole"), *arguments[5:]])
    assert whole.exit_code == 0
    again = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(value, again[key]) for key, value in weights.items())
