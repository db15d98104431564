"""Weights go where they fit, whatever holds and names them; what cannot be weights is called what it is."""

import gzip
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from meansparse_cli.errors import CheckpointError
from meansparse_cli.models.fitting import fit_weights
from meansparse_cli.models.weights import read_checkpoint

State = dict[str, Tensor]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)


class Normalise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))


class Wrapped(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.normalise = Normalise()
        setattr(self, name, Net())


def state(seed: int) -> State:
    torch.manual_seed(seed)
    return {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in Net().state_dict().items()}


def put(prefix: str, tensors: State) -> State:
    return {prefix + k: v for k, v in tensors.items()}


RAW, EMA = state(1), state(2)


def taken(network: nn.Module, checkpoint: Any, key: str | None = None) -> str:
    """Which of RAW and EMA the network has afterwards."""
    fit_weights(network, checkpoint, what="file", key=key)
    held = next(v for k, v in network.state_dict().items() if k.endswith("fc.weight"))
    return "raw" if torch.equal(held, RAW["fc.weight"]) else "ema" if torch.equal(held, EMA["fc.weight"]) else "?"


ALONE: dict[str, Any] = {
    "bare": RAW,
    "a list": [RAW],
    "a list inside": {"state_dict": [RAW], "err": 0.4},
    "only an average": {"ema": RAW},
    "any word": {"student_net": {"weights": RAW}, "step": 3},
    "deep": {"a": {"b": [{"c": RAW}]}},
    "params": {"params": RAW, "opt": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
    "lightning, compiled": {"state_dict": put("model._orig_mod.", RAW)},
    "prefixes the other way round": put("_orig_mod.module.model.", RAW),
    "repeated prefixes": put("module.module.", RAW),
    "in the middle": {k.replace("conv.", "conv._orig_mod."): v for k, v in RAW.items()},
    "sharded": {k.replace("bn.", "_fsdp_wrapped_module.bn."): v for k, v in RAW.items()},
    "averaged model": {"n_averaged": torch.tensor(5), **put("module.", RAW)},
    "profiled": {
        **RAW,
        "total_ops": torch.zeros(1),
        "conv.total_ops": torch.zeros(1),
        "conv.total_params": torch.ones(1),
    },
    "loss and metric beside": {
        "state_dict": {**put("net.", RAW), "loss.weight": torch.ones(5), "acc.correct": torch.ones(1)}
    },
    "an attacker's copy": {**put("module.model.", RAW), **put("module.attacker.model.", RAW)},
    "a module": nn.ModuleDict({"x": nn.Identity()}).state_dict() | put("y.", RAW),
    "old batch norm": {k: v for k, v in RAW.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("name", ALONE)
def test_the_one_set_that_fits_is_taken(name: str) -> None:
    assert taken(Net(), ALONE[name]) == "raw"


@pytest.mark.parametrize("name", ["net", "backbone", "model", "encoder"])
@pytest.mark.parametrize("checkpoint", ["bare", "lightning, compiled", "a list inside"])
def test_a_network_behind_a_normalisation(name: str, checkpoint: str) -> None:
    network = Wrapped(name)
    assert taken(network, ALONE[checkpoint]) == "raw"
    assert taken(nn.Sequential(Normalise(), Net()), ALONE[checkpoint]) == "raw"
    assert float(network.state_dict()["normalise.mean"][0, 0, 0, 0]) == 0.5


BOTH: dict[str, tuple[Any, str]] = {
    "timm": ({"state_dict": RAW, "state_dict_ema": EMA}, "state_dict_ema"),
    "deit": ({"model_ema": EMA, "model": RAW}, "model_ema"),
    "other": ({"ema_model_state_dict": EMA, "model_state_dict": RAW}, "ema_model_state_dict"),
    "lightning": ({"state_dict": {**put("ema_model.module.", EMA), **put("model.", RAW)}}, "state_dict.ema_model"),
    "swa": ({"net": RAW, "swa_net": {"n_averaged": torch.tensor(3), **put("module.", EMA)}}, "swa_net"),
    "diffusers": ({"ema": {"shadow_params": EMA}, "unet": RAW}, "ema.shadow_params"),
}


@pytest.mark.parametrize("name", BOTH)
def test_an_averaged_copy_is_named_and_can_be_taken(name: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint, key = BOTH[name]
    assert taken(Net(), checkpoint) == "raw"
    assert "--weights-key" in caplog.text
    assert taken(Net(), checkpoint, next(k for k in _keys(caplog.text))) == "ema"
    assert _keys(caplog.text) in ([key], [f"{key}.module"])
    with pytest.raises(CheckpointError, match="nothing under 'nonsense' fits"):
        taken(Net(), checkpoint, "nonsense")


def _keys(said: str) -> list[str]:
    said_of = [line for line in said.splitlines() if "--weights-key" in line]
    return [said_of[0].split("--weights-key ")[1].split(" takes")[0]]


def test_what_is_left_over_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fitted = fit_weights(Net(), {"model": RAW, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}, what="file")
    assert fitted.left_over == ("optimizer.state.0.exp_avg",)
    assert "1 further tensors left over (optimizer.state.0.exp_avg)" in caplog.text


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "missing": (lambda: {k: v for k, v in RAW.items() if k != "fc.bias"}, r"1 of \d+ tensors missing \(fc.bias\)"),
    "shape": (lambda: RAW | {"fc.weight": torch.zeros(7, 4)}, r"fc.weight \(7, 4\), expected \(5, 4\)"),
    "more layers": (lambda: RAW | {"bn.weight": torch.zeros(9)}, "of another shape"),
    "nan": (lambda: RAW | {"fc.bias": torch.full((5,), float("nan"))}, "fc.bias has 5 of 5 values"),
    "inf": (lambda: RAW | {"conv.weight": torch.full((4, 3, 3, 3), float("inf"))}, "conv.weight has 108 of 108"),
    "nan in a buffer": (
        lambda: RAW | {"bn.running_var": torch.tensor([1, 1, 1, float("nan")])},
        "bn.running_var has 1",
    ),
    "integer": (lambda: {k: (v * 10).to(torch.int8) for k, v in RAW.items()}, "torch.int8"),
    "complex": (lambda: RAW | {"fc.weight": RAW["fc.weight"].to(torch.complex64)}, "fc.weight is torch.complex64"),
    "sparse": (lambda: RAW | {"fc.weight": RAW["fc.weight"].to_sparse()}, "fc.weight is sparse"),
    "quantised": (
        lambda: RAW | {"fc.weight": torch.quantize_per_tensor(RAW["fc.weight"], 0.1, 0, torch.qint8)},
        "fc.weight is quantised",
    ),
    "meta": (lambda: {k: v.to("meta") for k, v in RAW.items()}, "meta device"),
    "nothing": (lambda: {"epoch": 3}, "no weights found, but a dictionary of epoch"),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch is about to drop quantised tensors
@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_weights_of_this_network_is_refused_and_the_network_stays(name: str) -> None:
    network = Net()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    make, says = WRONG[name]
    with pytest.raises(CheckpointError, match=says):
        fit_weights(network, make(), what="file")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_a_file_that_holds_itself_ends() -> None:
    loop: dict[str, Any] = {"model": RAW}
    loop["again"] = loop
    assert taken(Net(), loop) == "raw"


@pytest.mark.filterwarnings("ignore")  # PyTorch is about to drop TorchScript
def test_files_of_other_kinds_are_called_what_they_are(tmp_path: Path) -> None:
    torch.jit.script(nn.Sequential(nn.Linear(2, 2))).save(tmp_path / "scripted.pt")
    (tmp_path / "zipped.pt").write_bytes(gzip.compress(b"weights"))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.pt")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(3))
    (tmp_path / "arrays.npz").rename(tmp_path / "arrays.pt")
    (tmp_path / "pointer.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for name, says in {
        "scripted": "TorchScript",
        "zipped": "gzip",
        "array": "NumPy array",
        "arrays": "NumPy arrays",
        "pointer": "Git LFS pointer",
    }.items():
        with pytest.raises(CheckpointError, match=says):
            read_checkpoint(tmp_path / f"{name}.pt")
    save_file(RAW, tmp_path / "pytorch_model.bin")
    assert torch.equal(read_checkpoint(tmp_path / "pytorch_model.bin")["fc.weight"], RAW["fc.weight"])
