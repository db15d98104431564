"""The four stages end to end, on a tiny network of our own and on the embedded one; kill -9 in the middle of each."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner, Result

from meansparse_cli import load_sparsified
from meansparse_cli.attacks import PRESETS
from meansparse_cli.cli import app
from meansparse_cli.data.imagenet import Preprocessing
from meansparse_cli.models.factory import FactoryModel
from meansparse_cli.models.source import load_model, resolve_model
from meansparse_cli.runs.context import RunContext
from meansparse_cli.settings.stages import StageConfig
from tests.conftest import said

STAGES = ("fetch", "calibrate", "sweep-alpha", "evaluate")

N_STEPS = 20
# for subprocesses: one thread, a wide terminal, no colours
PLAIN = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1"}

FACTORY = '''
import os, time, torch
from torch import nn

def tiny():
    """A network whose every forward pass can be made slow, so that a test can kill it in the middle."""
    torch.manual_seed(11)

    class Tiny(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(3, 6, 3), nn.GELU(), nn.Linear(6, 3)

        def forward(self, x):
            time.sleep(float(os.environ.get("SLOW", 0)))
            return self.head(self.act(self.conv(x)).mean((2, 3))) * 20

    return Tiny()
'''


def meansparse(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def done(*arguments: str) -> Path:
    result = meansparse(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return Path(result.stdout.strip().splitlines()[-1])


def without_provenance(report: Path) -> dict[str, Any]:
    """What must be equal between an interrupted and an uninterrupted run: all but times, and hashes over times."""
    content = yaml.safe_load(report.read_text())
    for key in ("provenance", "content_sha256", "inputs"):
        del content[key]
    content["results"].pop("seconds", None)
    content["config"]["settings"].pop("data_dir", None)
    return content  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meansparse_cli.attacks.apgd.N_STEPS", N_STEPS)


@pytest.fixture
def tiny(tmp_path: Path, npz: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "networks.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    return ["--model", "networks.py:tiny", "--dataset", npz.name, "--run", "run"]


def small(stage: str) -> list[str]:
    return {
        "fetch": [],
        "calibrate": ["--batch-size", "8"],
        "sweep-alpha": ["--alphas", "0.1:0.3:0.1", "--eps", "16/255", "--attack", "pgd-20", "--block-size", "4"],
        "evaluate": ["--eps", "4/255", "--attack", "apgd-ce", "--attack", "bpda-apgd-ce", "--no-doubts"],
    }[stage]


def test_four_stages_and_the_ready_module(tiny: list[str], tmp_path: Path) -> None:
    reports = [done(stage, *tiny, *small(stage)) for stage in STAGES]
    assert [r.name for r in reports] == [f"{s}.yaml" for s in STAGES]
    calibrated, swept, evaluated = (yaml.safe_load(r.read_text())["results"] for r in reports[1:])
    assert calibrated["n_images"] == 96
    assert [s["name"] for s in calibrated["sites"]] == ["act"]
    assert [row["alpha"] for row in swept["curve"]] == [0.0, 0.1, 0.2, 0.3]
    names = [row["name"] for row in evaluated["comparisons"]]
    assert names[0] == "clean"
    assert names[-1] == "worst case"
    assert (tmp_path / "run" / "sweep-alpha.png").read_bytes().startswith(b"\x89PNG")

    x = torch.rand(5, 3, 8, 8)
    model, base = load_sparsified("run", alpha=0.3), load_sparsified("run", alpha=0)
    sys.path.insert(0, str(tmp_path))
    try:
        from networks import tiny as factory  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(tmp_path))
    assert torch.equal(base(x), factory().eval()(x))
    assert not torch.equal(model(x), base(x))


def test_attacks_of_another_release_are_not_done_already(tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("fetch", "calibrate"):
        done(stage, *tiny, *small(stage))
    command = [
        "evaluate",
        *tiny,
        "--alpha",
        "0.2",
        "--eps",
        "4/255",
        "--attack",
        "bpda",
        "--no-doubts",
        "--n-examples",
        "4",
    ]
    monkeypatch.setitem(PRESETS, "bpda", ("bpda-apgd-ce",))
    report = done(*command)
    assert "already done" in said(meansparse(*command))

    monkeypatch.setitem(PRESETS, "bpda", ("bpda-apgd-ce", "soft-0.05-apgd-ce"))
    again = meansparse(*command)
    assert again.exit_code == 0 and "was done before with other settings (attacks)" in said(again)
    names = [row["name"] for row in yaml.safe_load(report.read_text())["results"]["comparisons"]]
    assert "soft-0.05-apgd-ce" in names

    monkeypatch.setattr("meansparse_cli.engine.outcomes.ATTACKS_VERSION", 1_000)
    changed = meansparse(*command)
    assert changed.exit_code == 10 and "version 1000" in said(changed)


def test_what_the_doubts_break_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step of PGD leaves what the doubts' APGD breaks: that is known, so the worst case has to know it."""
    monkeypatch.setattr("meansparse_cli.diagnostics.search.N_STEPS", 10)
    monkeypatch.setattr("meansparse_cli.diagnostics.search.N_DRAWS", 5)
    run = ["--run", str(tmp_path / "run")]
    done("calibrate", "--model", "digits", *run)
    weak = ["evaluate", *run, "--alpha", "0.3", "--eps", "0.1", "--attack", "pgd-1", "--n-examples", "16"]

    def results(*options: str) -> dict[str, Any]:
        return yaml.safe_load(done(*weak, *options).read_text())["results"]  # type: ignore[no-any-return]

    without, found = results("--no-doubts", "--name", "without"), results("--name", "with", "--save-witnesses")
    doubts = {(doubt["model"], doubt["name"]): doubt for doubt in found["doubts"]}
    before, after = without["comparisons"][-1], found["comparisons"][-1]
    assert before["name"] == after["name"] == "worst case"
    for model in ("base", "sparsified"):
        n_new = doubts[model, "more steps and another start"]["details"]["n_new"]
        lost = round(16 * (before[f"{model}_accuracy"] - after[f"{model}_accuracy"]))
        assert lost >= n_new > 0 and found["pool"][f"doubts of {model}"] >= n_new
    # the attack's own number has no part in that
    assert before["attacks"] == after["attacks"] == ["pgd-1", "transfer"]
    assert without["comparisons"][1] == found["comparisons"][1]
    report = tmp_path / "run" / "evaluations" / "with" / "evaluate.yaml"
    report.unlink()  # killed before it was written: the images that the doubts found are kept
    again = results("--name", "with", "--save-witnesses")
    assert without_seconds(again) == without_seconds(found)


def without_seconds(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key not in ("seconds", "attacks")}


def test_a_second_call_does_nothing_again(tiny: list[str]) -> None:
    for stage in ("fetch", "calibrate", "sweep-alpha"):
        first = done(stage, *tiny, *small(stage))
        before = first.read_bytes()
        again = meansparse(stage, *tiny, *small(stage))
        assert again.exit_code == 0
        assert "already" in said(again)
        assert first.read_bytes() == before


def test_stdout_is_the_path_or_json_and_nothing_else(tiny: list[str]) -> None:
    assert meansparse("fetch", *tiny).stdout == "run/fetch.yaml\n"
    report = json.loads(meansparse("calibrate", *tiny, "--json").stdout)
    assert report["schema"] == "meansparse/calibrate/1"
    Path("run.yaml").write_text(
        "sweep-alpha: {alphas: 0.2, eps: 16/255, attack: pgd-50, n_examples: 8, block_size: 4}\n"
        "evaluate: {eps: 4/255, attack: [apgd-ce, bpda-apgd-ce], n_examples: 4, doubts: false}\n"
    )
    assert meansparse("run", *tiny, "--config", "run.yaml").stdout == "run/evaluate.yaml\n"
    report = json.loads(meansparse("run", *tiny, "--config", "run.yaml", "--json").stdout)
    assert report["schema"] == "meansparse/evaluate/1"


def test_a_factory_that_builds_another_network_is_refused(tiny: list[str], tmp_path: Path) -> None:
    done("calibrate", *tiny, *small("calibrate"))
    source = tmp_path / "networks.py"
    source.write_text(source.read_text().replace("manual_seed(11)", "manual_seed(12)"))
    sys.modules.pop("networks", None)
    refused = meansparse("sweep-alpha", *tiny, *small("sweep-alpha"))
    assert refused.exit_code == 10
    assert "builds another network than the one that was fetched" in said(refused)
    done("fetch", *tiny, "--fresh")
    assert meansparse("sweep-alpha", *tiny, *small("sweep-alpha")).exit_code == 10  # its statistics are the old one's
    done("calibrate", *tiny, *small("calibrate"))
    done("sweep-alpha", *tiny, *small("sweep-alpha"))


def test_weights_and_threats_that_would_not_be_used_are_refused(tiny: list[str], tmp_path: Path) -> None:
    done("calibrate", *tiny, *small("calibrate"))
    torch.save({}, "other.pt")
    for stage, more in (("evaluate", ["--alpha", "0.2"]), ("sweep-alpha", []), ("measure", [])):
        for name in ("other.pt", "nowhere.pt"):
            refused = meansparse(stage, "--run", "run", "--weights", name, *more)
            assert refused.exit_code == 10 and "not the weights that run is about" in said(refused)
    refused = meansparse("evaluate", "--run", "run", "--threat", "L2", "--alpha", "0.2")
    assert refused.exit_code == 3 and "networks.py:tiny for Linf" in said(refused)


def test_a_run_keeps_its_weights_whoever_mends_it(tiny: list[str], tmp_path: Path) -> None:
    """The command that is named ends with the same weights, not with those that the factory draws."""
    network = load_model(resolve_model("networks.py:tiny"))
    torch.save(network.state_dict(), "w.pt")
    done("calibrate", *tiny, "--weights", "w.pt", *small("calibrate"))
    (tmp_path / "elsewhere").mkdir()
    os.chdir("elsewhere")  # the weights are found from there too
    assert RunContext("load", StageConfig(run=Path("../run"))).weights == [tmp_path / "w.pt"]
    os.chdir(tmp_path)
    Path("w.pt").rename("gone.pt")
    refused = meansparse("sweep-alpha", "--run", "run", *small("sweep-alpha"))
    assert refused.exit_code == 10 and "--weights w.pt --run run --fresh" in said(refused)
    again = meansparse("fetch", *tiny)
    assert again.exit_code == 10 and "none are given now" in said(again)


def test_a_run_keeps_its_norm(tiny: list[str]) -> None:
    done("calibrate", *tiny, "--norm", "L2", *small("calibrate"))
    report = done(*shlex.split("evaluate --run run --alpha 0.2 --attack pgd-2 --n-examples 4 --no-doubts --eps 0.5"))
    assert yaml.safe_load(report.read_text())["config"]["settings"]["norm"] == "L2"


def test_an_alpha_of_ones_own_is_the_same_model_everywhere(tiny: list[str]) -> None:
    """In Python, an exported file and ``evaluate --alpha``: at all sites around the means, whatever the sweep had."""
    for stage in ("calibrate", "sweep-alpha"):
        done(stage, *tiny, *small(stage), *(["--centre", "zero"] if stage == "sweep-alpha" else []))
    file = done("export", "run", "--alpha", "0.3", "one.safetensors")
    x = torch.rand(5, 3, 8, 8)
    ours, exported = load_sparsified("run", alpha=0.3), load_sparsified(file, allow_code=True)
    assert torch.equal(ours(x), exported(x))
    assert not torch.equal(ours(x), load_sparsified("run")(x))


def test_a_killed_calibration_does_not_go_on_with_other_pixels(
    tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same files by another preprocessing: what is summed so far is thrown away."""
    seen: list[Any] = []
    monkeypatch.setattr(
        "meansparse_cli.stages.calibrate.calibrate_channels",
        lambda *_, state, **__: seen.append(state.on_disk.key) or 1 / 0,
    )
    for resized in (256, 224):
        monkeypatch.setattr(FactoryModel, "preprocessing", lambda *_, resized=resized: Preprocessing(8, resized))
        meansparse("calibrate", *tiny)
    assert len(seen) == 2 and seen[0] != seen[1]


def test_a_broken_chain_is_refused_and_mended_by_the_named_command(tiny: list[str]) -> None:
    missing = meansparse("sweep-alpha", *tiny)
    assert missing.exit_code == 10
    for stage in ("fetch", "calibrate", "sweep-alpha"):
        done(stage, *tiny, *small(stage))
    done("calibrate", *tiny, "--fraction", "0.5")  # other statistics than the sweep was made from
    stale = meansparse("evaluate", *tiny, *small("evaluate"))
    assert stale.exit_code == 10
    assert "made from another calibrate.yaml" in said(stale)
    report = Path("run/calibrate.yaml")
    report.write_text(report.read_text().replace("n_images: 48", "n_images: 50000"))
    edited = meansparse("sweep-alpha", *tiny, *small("sweep-alpha"))
    assert edited.exit_code == 10
    assert "was changed after it was written" in said(edited)
    done("calibrate", *tiny, "--fraction", "0.5", "--fresh")
    done("sweep-alpha", *tiny, *small("sweep-alpha"))
    done("evaluate", *tiny, *small("evaluate"))


# the command line, with calibrate saving after every batch, and as few steps as here
OFTEN = (
    "import meansparse_cli.operator.calibration as c; c.SECONDS_BETWEEN_SAVES = 0.0; "
    f"import meansparse_cli.attacks.apgd as a; a.N_STEPS = {N_STEPS}; "
    "from meansparse_cli.cli import app; app()"
)


def start(arguments: list[str], slow: float, folder: Path) -> "subprocess.Popen[bytes]":
    """The command in a process of its own, what it says to people in ``stderr.txt``."""
    with open(folder / "stderr.txt", "wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-c", OFTEN, *arguments],
            cwd=folder,
            start_new_session=True,
            env=PLAIN | {"SLOW": str(slow)},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            preexec_fn=hear_ctrl_c,
        )


def hear_ctrl_c() -> None:
    """A shell that runs the tests in the background has told them, and so their children, to ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_until(process: "subprocess.Popen[bytes]", has_begun: Callable[[], bool], limit: float = 120) -> None:
    deadline = time.monotonic() + limit
    while not has_begun():
        assert process.poll() is None, "it ended before it began"
        assert time.monotonic() < deadline, "it never began"
        time.sleep(0.02)


def kill_when(process: "subprocess.Popen[bytes]", has_begun: Callable[[], bool]) -> None:
    """kill -9 as soon as ``has_begun()``; the process must still be at work then."""
    wait_until(process, has_begun)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize("stage", ["calibrate", "sweep-alpha", "evaluate"])
def test_kill_9_in_the_middle_then_the_same_command(stage: str, tiny: list[str], tmp_path: Path) -> None:
    for earlier in STAGES[: STAGES.index(stage)]:
        done(earlier, *tiny, *small(earlier))
    if stage != "calibrate":
        shutil.copytree("run", "whole")  # which is not interrupted
    state = tmp_path / "run" / "state"
    begun: dict[str, Callable[[], bool]] = {
        "calibrate": lambda: (state / "calibrate.pt").exists(),
        "sweep-alpha": lambda: any(state.glob("sweep-alpha/*/block-000004-*.pt")),
        "evaluate": lambda: any(state.glob("evaluate/base/apgd-ce/*.pt")),
    }
    slow = {"calibrate": 0.4, "sweep-alpha": 0.05, "evaluate": 0.05}[stage]
    arguments = [stage, *tiny, *small(stage)]
    kill_when(start(arguments, slow, tmp_path), begun[stage])
    report = tmp_path / "run" / f"{stage}.yaml"
    assert not report.exists(), "it was killed in the middle"
    resumed = without_provenance(done(*arguments))

    other = [a if a != "run" else "whole" for a in tiny]
    whole = without_provenance(done(stage, *other, *small(stage)))
    assert resumed == whole


def test_a_second_command_is_refused_and_ctrl_c_exits_130_with_one_line(tiny: list[str], tmp_path: Path) -> None:
    done("fetch", *tiny)
    process = start(["calibrate", *tiny, *small("calibrate")], 2.0, tmp_path)
    try:
        wait_until(process, lambda: (tmp_path / "run" / "state" / "calibrate.pt").exists())
        result = meansparse("calibrate", *tiny, "--fraction", "0.1")
        assert result.exit_code == 10, result.output
        assert "another command is at work" in said(result)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
    finally:
        process.kill()
        process.wait()
    words = said((tmp_path / "stderr.txt").read_text())
    assert "nothing finished was lost" in words
    assert "Traceback" not in words
