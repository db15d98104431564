"""The authors' checkpoints: told apart by their keys, imported under any wrapper, carried through all four stages."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from meansparse_cli import load_sparsified
from meansparse_cli.cli import app
from meansparse_cli.errors import CheckpointError
from meansparse_cli.models import published_checkpoint, zoo
from meansparse_cli.models.names import ZooEntry
from meansparse_cli.models.published_checkpoint import (
    PUBLISHED_FILES,
    PublishedFile,
    bare_path,
    published_architecture,
    read_published,
    split_published,
    without_operators,
)
from meansparse_cli.sites.rules import among_published, parse_rule
from tests.conftest import said

IMAGES = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
BASE = ZooEntry("Bartoldson2024Adversarial_WRN-94-16", "cifar10", "Linf")
SPARSE = ZooEntry("Amini2024MeanSparse_S-WRN-94-16", "cifar10", "Linf")
FIRST_SCHEME = ZooEntry("Wang2023Better_WRN-70-16", "cifar10", "Linf")


def operator_paths(model: PublishedFile) -> list[str]:
    """Every path a file of the authors has operators at, as their code names them."""
    residual = {136: (15, 15, 15), 214: (30, 31, 10), 143: (30, 31, 10), 100: (11, 11, 11), 67: (11, 11, 11)}
    if (blocks := residual.get(model.n_sites)) is not None:
        names = (
            ["meansparse_0", "meansparse_1", "meansparse_2"]
            if model.n_sites not in (143, 67)
            else ["relu_0.0", "relu_1.0"]
        )
        paths = [f"layer.{g}.block.{i}.{name}" for g, n in enumerate(blocks) for i in range(n) for name in names]
        return [*paths, "meansparse_end" if len(names) == 3 else "relu.0"]
    if model.name == "Swin-L":
        names = ["meansparse1", "meansparse2", "mlp.meansparse1", "mlp.meansparse2"]
        return [
            f"layers.{s}.blocks.{b}.{name}" for s, n in enumerate((2, 2, 18, 2)) for b in range(n) for name in names
        ]
    if model.name == "ConvNeXt-L":
        names = ["mlp.act.0", "drop_path.1"]
        return [
            f"stages.{s}.blocks.{b}.{name}" for s, n in enumerate((3, 3, 27, 3)) for b in range(n) for name in names
        ]
    blocks = (5, 8, 23, 1)
    names = ["a", "b"]
    paths = [
        f"stages.stage{k}.stage{k}-block{b}.F.{x}.2.0" for k, n in enumerate(blocks, 1) for b in range(n) for x in names
    ]
    return ["stem.stem.stem.2.0", *paths]


def operators(paths: list[str], alpha: float = 0.2, channels: int = 2) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in paths:
        state |= {
            f"{path}.running_mean": torch.randn(channels),
            f"{path}.running_var": torch.rand(channels),
            f"{path}.threshold": torch.tensor(alpha),
            f"{path}.flag_update_statistics": torch.tensor(0),
            f"{path}.batch_num": torch.tensor(98.0),
        }
    return state


def weights(model: PublishedFile) -> dict[str, Tensor]:
    last = {"Swin-L": "head.fc.weight", "ConvNeXt-L": "head.fc.weight", "RaWRN-101-2": "fc.weight"}
    return {
        "init_conv.weight": torch.zeros(1, 3, 1, 1),
        last.get(model.name, "logits.weight"): torch.zeros(model.n_classes, 1),
    }


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
@pytest.mark.parametrize("model", PUBLISHED_FILES, ids=lambda m: f"{m.name}-{m.dataset}-{m.threat}")
def test_each_file_is_known_by_its_keys(model: PublishedFile, prefix: str) -> None:
    paths = operator_paths(model)
    state = {f"{prefix}{k}": v for k, v in (weights(model) | operators(paths)).items()}
    held = split_published(state, what="file")
    assert held.file is model
    assert set(held.statistics) == set(paths)
    assert held.alpha == 0.2
    assert {bare_path(key) for key in held.base} == set(weights(model))
    some = held.statistics[paths[0]]
    assert some.count == 98
    assert torch.equal(some.mean.float(), state[f"{prefix}{paths[0]}.running_mean"])
    assert torch.equal(some.std.float(), state[f"{prefix}{paths[0]}.running_var"].sqrt())


def test_a_file_of_another_model_under_the_same_name_is_refused() -> None:
    three = [m for m in PUBLISHED_FILES if m.file_name == "Wang2023Better_WRN-70-16_WS.pt"]
    assert len(three) == 3
    for model in three:
        state = weights(model) | operators(operator_paths(model))
        for other in three:
            entry = ZooEntry(other.base, other.dataset, other.threat)
            if other is model:
                assert set(without_operators(state, entry, "a.pt")) == set(weights(model))
                continue
            with pytest.raises(
                CheckpointError, match=f"is MeanSparse's WRN-70-16 for {model.dataset}, {model.threat}"
            ) as raised:
                without_operators(state, entry, "a.pt")
            assert str(raised.value.hint).endswith("--from-file FILE")


def test_alphas_that_differ_or_were_never_set_are_no_alpha() -> None:
    state = weights(PUBLISHED_FILES[0]) | operators(["a", "b"], alpha=0.0)
    assert split_published(state, what="file").alpha is None
    state["a.threshold"].fill_(0.15)
    held = split_published(state, what="file")
    assert held.alphas == {"a": 0.15, "b": 0.0}
    assert held.alpha is None
    state["b.running_var"][0] = -1
    with pytest.raises(CheckpointError, match="statistics of b"):
        split_published(state, what="file")


@pytest.mark.parametrize(
    ("given", "rule", "inner"),
    [
        ("published", "published", "all"),
        ("published: 0-5, 7", "published:0-5,7", "0-5,7"),
        (["published:0-5", 7], "published:0-5,7", "0-5,7"),
        ("all", "all", None),
    ],
)
def test_rules_among_the_published_sites(given: object, rule: str, inner: str | None) -> None:
    assert parse_rule(given) == rule
    assert among_published(rule) == inner


def test_which_architecture_takes_which_weights() -> None:
    assert published_architecture(BASE) == published_architecture(SPARSE) == SPARSE
    assert published_architecture(FIRST_SCHEME) is None
    assert published_architecture(ZooEntry("Standard", "cifar10", "Linf")) is None
    zoo_entries = set(zoo.zoo_entries())
    for model in PUBLISHED_FILES:
        assert ZooEntry(model.base, model.dataset, model.threat) in zoo_entries
        assert model.entry is None or ZooEntry(model.entry, model.dataset, model.threat) in zoo_entries


def small(name: str) -> nn.Module:
    import importlib

    zoo.zoo_entries()
    module, network = {
        SPARSE.name: ("Meansparse_wrn_94_16", "MeanSparse_DMWideResNet"),
        BASE.name: ("dm_wide_resnet", "DMWideResNet"),
        FIRST_SCHEME.name: ("dm_wide_resnet", "DMWideResNet"),
    }[name]
    architecture = getattr(importlib.import_module(f"robustbench.model_zoo.architectures.{module}"), network)
    return architecture(depth=10, width=1, activation_fn=nn.SiLU)  # type: ignore[no-any-return]


@pytest.fixture
def small_zoo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The zoo with the published architectures four hundred times smaller, and images of their size."""
    monkeypatch.setattr(zoo, "_row", lambda entry: {"model": lambda: small(entry.name), "gdrive_id": "x"})
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", x=rng.integers(0, 256, (100, 32, 32, 3)).astype(np.uint8), y=np.arange(100) % 10)
    return ["--dataset", "images.npz", "--run", "run"]


def published(alpha: float = 0.3) -> nn.Module:
    torch.manual_seed(7)
    network = small(SPARSE.name).eval()
    for module in network.modules():
        if hasattr(module, "threshold"):
            module.running_mean.normal_(0, 0.1)  # type: ignore[operator, union-attr]
            module.running_var.uniform_(0.1, 1)  # type: ignore[operator, union-attr]
            module.threshold.fill_(alpha)  # type: ignore[operator, union-attr]
    return network


def saved(state: dict[str, Any], name: str = "weights_WS.pt", prefix: str = "module.") -> str:
    torch.save({f"{prefix}{k}": v for k, v in state.items()}, name)
    return name


def meansparse(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def done(*arguments: str) -> dict[str, Any]:
    result = meansparse(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return yaml.safe_load(Path(result.stdout.strip().splitlines()[-1]).read_text())["results"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [SPARSE.name, BASE.name])
def test_the_published_model_is_evaluated_as_it_is(name: str, small_zoo: list[str]) -> None:
    theirs = published()
    done("fetch", "--model", name, *small_zoo, "--from-file", saved(dict(theirs.state_dict())))
    calibrated = done("calibrate", "--model", name, *small_zoo, "--statistics", "stored")
    assert [site["name"] for site in calibrated["sites"]][:3] == [f"layer.0.block.0.meansparse_{i}" for i in range(3)]
    assert (len(calibrated["sites"]), calibrated["alpha"], calibrated["rule"]) == (10, 0.3, "published")
    with torch.no_grad():
        assert torch.equal(load_sparsified("run")(IMAGES), theirs(IMAGES))
    attack = "bpda-apgd-ce" if name == SPARSE.name else "pgd-2"
    evaluated = done("evaluate", *small_zoo, "--eps", "2/255", "--attack", attack, "--n-examples", "2", "--no-doubts")
    assert evaluated["alpha"] == 0.3


def test_the_authors_sites_are_the_default_where_a_model_has_them(small_zoo: list[str]) -> None:
    done("fetch", "--model", SPARSE.name, *small_zoo, "--from-file", saved(dict(published().state_dict())))
    measured = done("calibrate", "--model", SPARSE.name, *small_zoo)
    assert (measured["rule"], len(measured["sites"]), measured["n_images"]) == ("published", 10, 80)
    assert "alpha" not in measured
    activations = done("calibrate", "--model", SPARSE.name, *small_zoo, "--sites", "all")
    assert [s["name"] for s in activations["sites"]][:2] == ["layer.0.block.0.relu_0", "layer.0.block.0.relu_1"]
    assert len(activations["sites"]) == 7
    swept = done("sweep-alpha", *small_zoo, "--alphas", "0.2", "--attack", "pgd-2", "--eps", "2/255")
    assert [row["alpha"] for row in swept["curve"]] == [0.0, 0.2]


def test_sites_published_puts_a_base_into_the_architecture(small_zoo: list[str]) -> None:
    torch.manual_seed(9)
    plain = small(BASE.name).eval()
    done("fetch", "--model", "Bartoldson2024", *small_zoo, "--from-file", saved(dict(plain.state_dict())))
    default = done("calibrate", "--model", "Bartoldson2024", *small_zoo)
    assert len(default["sites"]) == 7
    calibrated = done("calibrate", "--model", "Bartoldson2024", *small_zoo, "--sites", "published")
    assert len(calibrated["sites"]) == 10
    done("sweep-alpha", *small_zoo, "--alphas", "0.2", "--attack", "pgd-2", "--eps", "2/255")
    with torch.no_grad():
        assert torch.equal(load_sparsified("run", alpha=0)(IMAGES), plain(IMAGES))
        assert not torch.equal(load_sparsified("run", alpha=0.2)(IMAGES), plain(IMAGES))
    some = done(
        "calibrate", "--model", "Bartoldson2024", *small_zoo, "--sites", "published:*meansparse_2,meansparse_end"
    )
    assert [s["name"] for s in some["sites"]] == [
        *(f"layer.{g}.block.0.meansparse_2" for g in range(3)),
        "meansparse_end",
    ]
    listed = meansparse("sites", "--model", "Bartoldson2024", *small_zoo, "--sites", "published", "--json")
    assert [site["chosen_by"] for site in json.loads(listed.stdout)] == ["published"] * 10
    refused = meansparse("calibrate", "--model", "Bartoldson2024", *small_zoo, "--statistics", "stored")
    assert refused.exit_code == 3
    assert "hold no MeanSparse operators" in said(refused)


def test_a_file_of_the_first_scheme_goes_to_the_activations(small_zoo: list[str]) -> None:
    torch.manual_seed(9)
    plain = small(FIRST_SCHEME.name).eval()
    paths = [f"layer.{g}.block.0.relu_{i}.0" for g in range(3) for i in range(2)] + ["relu.0"]
    channels = [16, 16, 16, 32, 32, 64, 64]
    state = dict(plain.state_dict())
    for path, n in zip(paths, channels, strict=True):
        state |= operators([path], alpha=0.2, channels=n)
    done("fetch", "--model", FIRST_SCHEME.name, *small_zoo, "--from-file", saved(state))
    for more in (["--statistics", "stored"], ["--sites", "published"]):
        calibrated = done("calibrate", "--model", FIRST_SCHEME.name, *small_zoo, *more)
        assert [f"{s['name']}.0" for s in calibrated["sites"]] == paths
    done("fetch", "--model", FIRST_SCHEME.name, *small_zoo, "--from-file", saved(dict(plain.state_dict())), "--fresh")
    calibrated = done("calibrate", "--model", FIRST_SCHEME.name, *small_zoo, "--sites", "published")
    assert [f"{s['name']}.0" for s in calibrated["sites"]] == paths


def test_a_file_names_its_model(small_zoo: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = published()
    n_sites = sum(hasattr(module, "threshold") for module in theirs.modules())
    monkeypatch.setattr(published_checkpoint, "PUBLISHED_FILES", (replace(PUBLISHED_FILES[0], n_sites=n_sites),))
    path = saved(dict(theirs.state_dict()))
    found = done("fetch", "--from-file", path)
    assert found["model"] == {"name": SPARSE.name, "kind": "zoo", "dataset": "cifar10", "threat": "Linf"}
    torch.save(small(BASE.name).state_dict(), "other.pt")
    refused = meansparse("fetch", "--from-file", "other.pt")
    assert refused.exit_code == 3
    assert "--model NAME" in said(refused)


def test_a_model_the_authors_never_touched_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = meansparse("calibrate", "--model", "digits", "--sites", "published")
    assert result.exit_code == 8
    assert "no published MeanSparse model has this architecture" in said(result)


def test_a_file_without_operators_is_none(tmp_path: Path) -> None:
    torch.save(
        {"conv.weight": torch.zeros(1), "bn.running_mean": torch.zeros(1), "bn.running_var": torch.ones(1)},
        tmp_path / "a.pt",
    )
    assert read_published(tmp_path / "a.pt") is None
