"""Some forty tiny odd networks, through the commands: each works, or is refused in one sentence with its exit code."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from meansparse_cli.cli import app
from meansparse_cli.models.source import load_model, resolve_model
from tests.conftest import said

pytestmark = pytest.mark.filterwarnings("ignore")  # what PyTorch warns of in these networks
NETS = Path(__file__).with_name("odd_networks.py")
TAKEN = "taken as logits"
UNSEEN = "code whose insides cannot be seen"
NOT_REGISTERED = "that is not registered"

WORK = {
    "Net": "",
    "Tuple": f"gives tuple: its first tensor is {TAKEN}",
    "ListAfterNone": f"gives list: its first tensor is {TAKEN}",
    "Dict": f"gives dict: its logits are {TAKEN}",
    "DictOther": f"gives dict: its first tensor is {TAKEN}",
    "Record": f"gives Output: its logits are {TAKEN}",
    "DataClass": f"gives Kept: its logits are {TAKEN}",
    "Double": "",
    "half": "",
    "InPlace": "",
    "NoGrad": "",
    "Detached": "",
    "Checkpointed": "",
    "LooseActivation": "",
    "MadeOnTheWay": "",
    "CallsScripted": f"{UNSEEN} (scripted, traced, exported) in (model) (gelu)",
    "HoldsScripted": f"{UNSEEN} (scripted, traced, exported) in (model) (tanh)",
    "ScriptedActivation": f"{UNSEEN} (scripted, traced, exported) in other (silu)",
    "TimmsSwish": "",
    "InSequence": "",
    "graph": "",
    "parallel": f"gives tuple: its first tensor is {TAKEN}",
    "compiled": f"gives tuple: its first tensor is {TAKEN}",
    "Prints": "",
}
REFUSED = {
    "Nothing": (7, "gives NoneType without a tensor"),
    "FeaturesFirst": (7, "torch.float32 of shape (2, 4, 6, 6) for 2 images; expected floating-point logits"),
    "Maps": (7, "of shape (2, 4, 6, 6) for 2 images"),
    "OneRow": (7, "of shape (1, 10) for 2 images"),
    "Labels": (7, "torch.int64 of shape (2,)"),
    "HalfInside": (7, "RuntimeError: mat1 and mat2 must have the same dtype"),
    "FixedBatch": (7, "RuntimeError: shape '[16, 4]' is invalid"),
    "InList": (8, f"uses a Conv2d {NOT_REGISTERED}"),
    "InDict": (8, f"uses a BatchNorm2d {NOT_REGISTERED}"),
    "LooseParameter": (8, f"uses a parameter of shape (10,) {NOT_REGISTERED}"),
    "LooseDropout": (8, f"uses a Dropout {NOT_REGISTERED}"),
    "NoneRegistered": (8, f"uses a Linear {NOT_REGISTERED}"),
    "scripted": (8, f"no activation was found in this model, but {UNSEEN}"),
    "exported": (4, "cannot be put in eval mode"),
    "quantised": (4, "is quantised or no tensor"),
    "lazy": (4, "is not there yet (a lazy layer)"),
    "meta": (4, "is on the meta device"),
    "Exits": (7, "SystemExit"),
    "Recurses": (7, "RecursionError"),
    "Interrupts": (130, "interrupted: nothing finished was lost"),
    "Fails": (7, "NotImplementedError: [/] later"),
    "upset": (7, "Upset: no [bold]"),
    "exits": (4, "SystemExit: no licence"),
    "needs_arguments": (4, "missing 1 required positional argument"),
    "gives_class": (4, "gave the class Net, expected a torch.nn.Module"),
    "gives_weights": (4, "gave OrderedDict, expected a torch.nn.Module"),
    "nowhere": (4, "has no 'nowhere'"),
}


def command(name: str, net: str, run: Path, *options: str) -> Result:
    of_net = ["--model", f"{NETS}:{net}", "--dataset", "digits", "--run", str(run)]
    return CliRunner().invoke(app, [name, *(of_net if net else ["--run", str(run)]), *options])


@pytest.mark.parametrize("net", [pytest.param(n, marks=pytest.mark.slow) if n == "compiled" else n for n in WORK])
def test_a_network_that_works(net: str, tmp_path: Path) -> None:
    sites = command("sites", net, tmp_path / "r", "--json")
    assert sites.exit_code == 0, said(sites)
    assert WORK[net] in said(sites) and (WORK[net] or UNSEEN not in said(sites))
    assert len(json.loads(sites.stdout)) == (2 if net == "InSequence" else 1), "the activations that can be seen"
    calibrate = command("calibrate", net, tmp_path / "r", "--n-examples", "16")
    assert calibrate.exit_code == 0, said(calibrate)
    assert calibrate.stdout == f"{tmp_path / 'r' / 'calibrate.yaml'}\n", "nothing else on stdout"
    measure = command("measure", "", tmp_path / "r", "--attack", "none", "--alphas", "0.2", "--n-examples", "8")
    assert measure.exit_code == 0, said(measure)
    report = CliRunner().invoke(app, ["report", str(tmp_path / "r")])
    assert ("code whose insides cannot be seen" in report.stdout) == (UNSEEN in WORK[net])


@pytest.mark.parametrize("name", ["sites", "calibrate"])
@pytest.mark.parametrize("net", REFUSED)
def test_a_network_that_is_refused(net: str, name: str, tmp_path: Path) -> None:
    code, sentence = REFUSED[net]
    result = command(name, net, tmp_path / "r")
    assert (result.exit_code, result.stdout) == (code, ""), said(result)
    assert sentence in said(result)


@pytest.mark.parametrize("net", [net for net, (code, _) in REFUSED.items() if code != 8])
def test_fetch_refuses_it_already(net: str, tmp_path: Path) -> None:
    result = command("fetch", net, tmp_path / "r")
    assert result.exit_code == REFUSED[net][0], said(result)
    assert REFUSED[net][1] in said(result)
    assert not (tmp_path / "r" / "fetch.yaml").exists()


def test_code_that_ends_the_program_halfway_is_an_error(tmp_path: Path) -> None:
    result = command("calibrate", "ExitsLater", tmp_path / "r", "--n-examples", "16")
    assert result.exit_code == 7 and "SystemExit: 0" in said(result)
    assert not (tmp_path / "r" / "calibrate.yaml").exists()


@pytest.mark.parametrize("net", ["NoGrad", "Detached"])
def test_a_network_without_a_gradient_is_said_to_have_none(net: str, tmp_path: Path) -> None:
    assert command("calibrate", net, tmp_path / "r", "--n-examples", "16").exit_code == 0
    result = command("measure", "", tmp_path / "r", "--attack", "apgd-ce", "--alphas", "0.2", "--n-examples", "8")
    assert result.exit_code == 12 and "no gradient with respect to the image" in said(result)


def test_logits_that_are_nan_are_refused(tmp_path: Path) -> None:
    assert command("calibrate", "NaN", tmp_path / "r", "--n-examples", "16").exit_code == 0
    result = command("measure", "", tmp_path / "r", "--attack", "none", "--alphas", "0.2", "--n-examples", "8")
    assert result.exit_code == 12 and "NaN or infinite for 16 of 16 images" in said(result)


def test_a_network_that_works_in_place_leaves_its_images_alone() -> None:
    nets = {name: load_model(resolve_model(f"{NETS}:{name}", "digits")) for name in ("InPlace", "NotInPlace")}
    images = torch.rand(4, 1, 8, 8)
    before = images.clone()
    logits = {name: net(images) for name, net in nets.items()}
    assert torch.equal(images, before)
    assert torch.equal(logits["InPlace"], logits["NotInPlace"])
    for net in nets.values():  # and an attack can have its gradient
        (gradient,) = torch.autograd.grad(net(x := images.clone().requires_grad_()).sum(), x)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("seconds", [0.03, 0.15, 0.3, 0.45, 1.0])
def test_ctrl_c_while_it_starts_is_one_line(seconds: float, tmp_path: Path) -> None:
    typed = [sys.executable, "-m", "meansparse_cli", "calibrate", "--model", "digits", "--run", str(tmp_path / "r")]
    # a test run that was started in the background has Ctrl-C switched off, and children inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        started = subprocess.Popen(typed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    time.sleep(seconds + 0.04)  # the interpreter itself
    started.send_signal(signal.SIGINT)
    _, errors = started.communicate(timeout=60)
    # on a busy machine: before the handler is there, in Python's own start (1) or at our first import
    if started.returncode in (1, -signal.SIGINT):
        assert "cli/app.py" not in errors and seconds < 1
        return
    assert started.returncode == 130
    assert len([line for line in errors.splitlines() if "interrupted" in line]) == 1 and "Traceback" not in errors
