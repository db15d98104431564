"""The zoo: its table, and checkpoints in each of RobustBench's formats, read back to the same logits."""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from meansparse_cli.errors import CheckpointError, ConfigError, ModelNotFound
from meansparse_cli.models.names import ZooEntry
from meansparse_cli.models.robustbench import import_robustbench
from meansparse_cli.models.weights import read_checkpoint
from meansparse_cli.models.zoo import build_zoo_model, load_zoo_weights, zoo_entries, zoo_source

SMALL = ZooEntry("Hendrycks2020AugMix_WRN", "cifar10", "corruptions")
RESNET18 = ZooEntry("Addepalli2021Towards_RN18", "cifar10", "Linf")
LAST = ZooEntry("Kireev2021Effectiveness_RLAT", "cifar10", "corruptions")
NORMALISED = ZooEntry("Salman2020Do_R18", "imagenet", "Linf")
IMAGES = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def random_model(entry: ZooEntry, seed: int = 1) -> nn.Module:
    """A model whose running statistics are not those of a new one."""
    torch.manual_seed(seed)
    model = build_zoo_model(entry)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.8, 1.2)  # type: ignore[union-attr]
    return model.eval()


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{key}": value for key, value in state.items()}


def saved(checkpoint: Any, path: Path, **how: Any) -> Path:
    torch.save(checkpoint, path, **how)
    return path


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IMAGES)  # type: ignore[no-any-return]


def test_the_table_is_robustbenchs() -> None:
    entries = zoo_entries()
    assert len(entries) == len(set(entries)) == 206
    assert ZooEntry("Bartoldson2024Adversarial_WRN-94-16", "cifar10", "Linf") in entries
    for entry in entries:
        files = zoo_source(entry)
        assert files and all(f.origin.startswith("https://") and f.path is None for f in files)
    assert len(zoo_source(ZooEntry("Chen2020Adversarial", "cifar10", "Linf"))) == 3
    assert zoo_source(ZooEntry("Standard_R50", "imagenet", "Linf"))[0].sha256 == "0676ba61"
    with pytest.raises(ModelNotFound):
        zoo_source(ZooEntry("Nobody2030", "cifar10", "Linf"))


PROBE = """
import sys
sys.path.insert(0, sys.argv[1])
from meansparse_cli.models import zoo
assert "robustbench" not in sys.modules, "robustbench was imported too early"
assert zoo.zoo_entries() == []
import robustbench
print(robustbench.AutoAttack.__module__, *sorted({"autoattack", "autoattack.state"} & set(sys.modules)))
"""


@pytest.mark.parametrize("has_autoattack", [False, True])
def test_the_import_is_mended_only_where_it_is_broken(tmp_path: Path, has_autoattack: bool) -> None:
    files = {
        "robustbench/__init__.py": "import pkg_resources\nfrom autoattack import AutoAttack\nimport autoattack.state",
        "robustbench/model_zoo/__init__.py": "",
        "robustbench/model_zoo/models.py": "model_dicts = {}",
        "pyautoattack/__init__.py": "class AutoAttack: pass",
        "pyautoattack/state.py": "",
    }
    if has_autoattack:
        files |= {"autoattack/__init__.py": "class AutoAttack: pass", "autoattack/state.py": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    done = subprocess.run([sys.executable, "-c", PROBE, str(tmp_path)], capture_output=True, text=True)
    expected = "autoattack autoattack autoattack.state" if has_autoattack else "pyautoattack"
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


def test_robustbench_that_is_missing_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robustbench.model_zoo.models", None)
    with pytest.raises(ConfigError, match="pip install robustbench"):
        import_robustbench()


def filled(network: nn.Module, entry: ZooEntry, paths: list[Path], **options: Any) -> nn.Module:
    load_zoo_weights(network, entry, paths, **options)
    return network.eval()


@pytest.mark.parametrize(
    ("entry", "wrap"),
    [
        (SMALL, lambda s: s),
        (SMALL, lambda s: {"state_dict": prefixed(s, "module."), "epoch": 3}),
        (SMALL, lambda s: {"state_dict": prefixed(s, "module.model.")}),
        (SMALL, lambda s: {"model": s, "optimizer": {"state": {}}}),
        (SMALL, lambda s: prefixed(s, "module.")),
        (SMALL, lambda s: {k: v for k, v in s.items() if k not in ("mu", "sigma")}),
        (SMALL, lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")}),
        (SMALL, lambda s: {"net": s, "args": argparse.Namespace(lr=0.1), "acc": np.float64(0.5)}),
        (SMALL, lambda s: s | {"attacker.model.conv1.weight": torch.zeros(1), "conv1.scores": torch.zeros(2)}),
        (LAST, lambda s: {"last": s, "best": {k: v + 1 for k, v in s.items()}}),
    ],
    ids=["plain", "dataparallel", "double", "model", "module", "no-mu", "no-batches", "extras", "lenient", "last"],
)
def test_each_format_gives_the_same_logits(entry: ZooEntry, wrap: Any, tmp_path: Path) -> None:
    model = random_model(entry)
    path = saved(wrap(dict(model.state_dict())), tmp_path / "weights.pt")
    again = filled(build_zoo_model(entry), entry, [path])
    assert torch.equal(logits(again), logits(model))


def test_the_old_file_format_is_read(tmp_path: Path) -> None:
    model = random_model(SMALL)
    path = saved(model.state_dict(), tmp_path / "weights.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(logits(filled(build_zoo_model(SMALL), SMALL, [path])), logits(model))


def test_imagenet_weights_go_behind_the_normalisation(tmp_path: Path) -> None:
    model = random_model(NORMALISED)
    inner = {k.removeprefix("model."): v for k, v in model.state_dict().items() if k.startswith("model.")}
    path = saved({"state_dict": prefixed(inner, "module.")}, tmp_path / "weights.pt")
    again = filled(build_zoo_model(NORMALISED), NORMALISED, [path])
    assert torch.equal(logits(again), logits(model))


def test_which_of_two_sets_was_taken_is_told(tmp_path: Path) -> None:
    model = random_model(LAST)
    s = dict(model.state_dict())
    path = saved({"last": s, "best": {k: v + 1 for k, v in s.items()}}, tmp_path / "weights.pt")
    found = {key: load_zoo_weights(build_zoo_model(LAST), LAST, [path], key=key) for key in ("last", "best")}
    assert {key: (f.taken, f.others) for key, f in found.items() if f is not None} == {
        "last": ("last", ("best",)),
        "best": ("best", ("last",)),
    }
    with pytest.raises(CheckpointError, match="nothing under 'ema' fits"):
        load_zoo_weights(build_zoo_model(LAST), LAST, [path], key="ema")


class TinyEnsemble(nn.Module):
    """The shape of RobustBench's ensembles, small."""

    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList(nn.Linear(4, 3) for _ in range(3))


def test_an_ensemble_takes_its_files_in_order_or_one_whole_file(tmp_path: Path) -> None:
    entry = ZooEntry("Chen2020Adversarial", "cifar10", "Linf")
    model = TinyEnsemble()
    paths = [
        saved({"state_dict": prefixed(member.state_dict(), "module.")}, tmp_path / f"{i}.pt")
        for i, member in enumerate(model.models)
    ]
    whole = saved(model.state_dict(), tmp_path / "whole.pt")
    for files in (paths, [whole]):
        again = filled(TinyEnsemble(), entry, files)
        assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    with pytest.raises(CheckpointError, match="ensemble of 3 files, 2 given"):
        load_zoo_weights(TinyEnsemble(), entry, paths[:2])
    with pytest.raises(CheckpointError, match="ensemble of 3 files, 1 given"):
        load_zoo_weights(TinyEnsemble(), entry, paths[:1])


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "conv1.weight"}, r"1 of \d+ tensors missing \(conv1.weight\)"),
        (lambda s: s | {"linear.weight": torch.zeros(100, 512)}, r"linear.weight \(100, 512\), expected \(10, 512\)"),
        (lambda s: s | {"conv1.bias": torch.zeros(64)}, r"1 unexpected \(conv1.bias\)"),
        (lambda s: s | {"layer1.7.conv1.weight": torch.zeros(2)}, r"1 unexpected \(layer1.7.conv1.weight\)"),
        (lambda s: {"epoch": 3, "lr": 0.1}, "no weights found, but a dictionary of epoch, lr"),
        (lambda s: [1, 2], "no weights found, but list"),
    ],
)
def test_other_weights_are_refused_and_the_model_stays(spoil: Any, says: str, tmp_path: Path) -> None:
    model = random_model(RESNET18)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = saved(spoil(dict(random_model(RESNET18, seed=2).state_dict())), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=says):
        load_zoo_weights(model, RESNET18, [path])
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_deeper_model_is_refused_even_where_more_keys_are_let_pass(tmp_path: Path) -> None:
    model = random_model(SMALL)
    deeper = dict(model.state_dict()) | {"block1.layer.6.conv1.weight": torch.zeros(32, 32, 3, 3)}
    with pytest.raises(CheckpointError, match="block1.layer.6.conv1.weight"):
        load_zoo_weights(model, SMALL, [saved(deeper, tmp_path / "weights.pt")])


class Custom:
    """Something a checkpoint should not hold."""


def test_code_in_a_checkpoint_is_run_only_when_asked(tmp_path: Path) -> None:
    model = random_model(SMALL)
    path = saved({"state_dict": model.state_dict(), "config": Custom()}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="Custom") as raised:
        read_checkpoint(path)
    assert raised.value.hint is not None and "--allow-pickle" in raised.value.hint
    again = filled(build_zoo_model(SMALL), SMALL, [path], allow_pickle=True)
    assert torch.equal(logits(again), logits(model))


def test_what_is_no_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    with pytest.raises(CheckpointError, match="no weights at"):
        read_checkpoint(path)
    whole = saved(random_model(SMALL).state_dict(), tmp_path / "whole.pt").read_bytes()
    for content, says in [
        (b"", "is empty"),
        (b"\n<!doctype html><p>Quota exceeded", "is a web page"),
        (whole[: len(whole) // 2], "ends too early"),
        (b"garbage" * 100, "not a"),
        (b"\x80\x02}q\x00.", "no weights found|not a"),
    ]:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=says):
            filled(build_zoo_model(SMALL), SMALL, [path])
    path = tmp_path / "weights.safetensors"
    path.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        read_checkpoint(path)
