"""What leaves a run: one file that needs nothing else, RobustBench's own format, a card without invented figures."""

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from meansparse_cli import load_sparsified
from meansparse_cli.cli import app
from meansparse_cli.engine.comparison import Evaluation
from meansparse_cli.engine.outcomes import ModelOutcomes, Spent
from meansparse_cli.errors import ArtifactError
from meansparse_cli.models import zoo
from meansparse_cli.models.export import robustbench_state, save_exported
from meansparse_cli.models.source import ModelSource, kind_of, load_model, resolve_model
from meansparse_cli.operator.checkpoint import Checkpoint, load_checkpoint, sparsify
from meansparse_cli.operator.statistics import ChannelStatistics
from meansparse_cli.reporting.card import model_card
from meansparse_cli.sites.find import Site, find_sites
from tests.conftest import said

IMAGES = torch.linspace(0, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
BASE = "Bartoldson2024Adversarial_WRN-94-16"
SOURCE = ModelSource(BASE, "zoo", "cifar10", "Linf")
CARD_FIELDS = {
    "link",
    "name",
    "authors",
    "additional_data",
    "number_forward_passes",
    "dataset",
    "venue",
    "architecture",
    "eps",
    "clean_acc",
    "reported",
    "autoattack_acc",
    "external",
    "footnote",
    "unreliable",
}
"""The keys of RobustBench's cards."""


def shown_by_a_leaderboard(card: dict[str, Any]) -> float:
    """The figure that RobustBench's generator sorts by: a key that is there is converted, whatever it holds."""
    return float(card["external"] if "external" in card else card["autoattack_acc"])


FACTORY = """
from torch import nn

def tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.head = nn.Conv2d(3, 6, 3), nn.GELU(), nn.Linear(6, 10)
            self.again = self.head

        def forward(self, x):
            return self.again(self.act(self.conv(x)).mean((2, 3)))

    return Tied()
"""


def meansparse(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def done(*arguments: str) -> Path:
    result = meansparse(*arguments)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return Path(result.stdout.strip().splitlines()[-1])


def architecture(sparse: bool) -> nn.Module:
    zoo.zoo_entries()  # mends robustbench's import
    name = "Meansparse_wrn_94_16" if sparse else "dm_wide_resnet"
    module = importlib.import_module(f"robustbench.model_zoo.architectures.{name}")
    network = module.MeanSparse_DMWideResNet if sparse else module.DMWideResNet
    return network(depth=10, width=1, activation_fn=nn.SiLU)  # type: ignore[no-any-return]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "images.npz", x=rng.integers(0, 256, (100, 32, 32, 3)).astype(np.uint8), y=np.arange(100) % 10)
    return ["--dataset", "images.npz", "--run", "run"]


@pytest.fixture
def calibrated(data: list[str], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A small WRN-94-16 calibrated at the authors' sites; the base it began with."""
    monkeypatch.setattr(
        zoo, "_row", lambda entry: {"model": lambda: architecture(entry.name != BASE), "gdrive_id": "x"}
    )
    torch.manual_seed(5)
    base = architecture(sparse=False).eval()
    torch.save(base.state_dict(), "weights.pt")
    done("fetch", "--model", BASE, *data, "--from-file", "weights.pt")
    done("calibrate", "--model", BASE, *data, "--sites", "published")
    return base


def test_robustbenchs_own_class_loads_our_result_strictly(calibrated: nn.Module, tmp_path: Path) -> None:
    ours = load_sparsified("run", alpha=0.25)
    path = done("export", "run", "--alpha", "0.25", "--format", "robustbench", str(tmp_path / "result.pt"))
    theirs = architecture(sparse=True).eval()
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
    alphas = {float(m.threshold) for m in theirs.modules() if hasattr(m, "threshold")}
    assert alphas == {0.25}
    with torch.no_grad():
        torch.testing.assert_close(theirs(IMAGES), ours(IMAGES))
        assert not torch.allclose(theirs(IMAGES), calibrated(IMAGES))
    # and back again: it is a checkpoint like the authors' own
    model = "Amini2024MeanSparse_S-WRN-94-16"
    done("fetch", "--model", model, "--dataset", "cifar10", "--run", "back", "--from-file", str(path))
    done("calibrate", "--run", "back", "--statistics", "stored")
    with torch.no_grad():
        assert torch.equal(load_sparsified("back")(IMAGES), theirs(IMAGES))


def test_robustbenchs_loader_reads_our_result(
    calibrated: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "Amini2024MeanSparse_S-WRN-94-16"
    (tmp_path / "cifar10" / "Linf").mkdir(parents=True)
    done("export", "run", "--alpha", "0.25", "--format", "robustbench", f"cifar10/Linf/{name}.pt")
    utils = importlib.import_module("robustbench.utils")
    row = {name: {"model": lambda: architecture(sparse=True), "gdrive_id": "x"}}
    monkeypatch.setattr(utils, "all_models", {k: dict.fromkeys(v, row) for k, v in utils.all_models.items()})
    theirs = utils.load_model(name, model_dir=str(tmp_path), dataset="cifar10", threat_model="Linf")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IMAGES), load_sparsified("run", alpha=0.25)(IMAGES))


def test_some_of_the_sites_leave_the_others_off(calibrated: nn.Module, data: list[str]) -> None:
    done("calibrate", "--model", BASE, *data, "--sites", "published:*meansparse_2")
    path = done("export", "run", "--alpha", "0.5", "--format", "robustbench")
    theirs = architecture(sparse=True).eval()
    theirs.load_state_dict(torch.load(path, weights_only=True), strict=True)
    on = [name for name, m in theirs.named_modules() if getattr(m, "threshold", 0) > 0]
    assert on == [f"layer.{g}.block.0.meansparse_2" for g in range(3)]
    done("calibrate", "--model", BASE, *data, "--sites", "all")
    refused = meansparse("export", "run", "--alpha", "0.5", "--format", "robustbench")
    assert refused.exit_code == 3
    assert "--sites published" in said(refused)


def test_one_file_needs_neither_run_nor_cache(
    calibrated: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_sparsified("run", alpha=0.25)
    path = done("export", "run", "--alpha", "0.25").resolve()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    moved = path.rename(elsewhere / "model.safetensors")
    (tmp_path / "run").rename(tmp_path / "gone")
    monkeypatch.setenv("MEANSPARSE_CACHE", str(elsewhere / "empty"))
    monkeypatch.chdir(elsewhere)
    model = load_sparsified(moved)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), expected(IMAGES))
        assert torch.equal(load_sparsified("model.safetensors", alpha=0)(IMAGES), calibrated(IMAGES))
    assert [site.name for site in model.sites] == [site.name for site in expected.sites]


@pytest.mark.parametrize("name", ["digits", "networks.py:tied"])
def test_one_file_of_every_kind(name: str, data: list[str], tmp_path: Path) -> None:
    (tmp_path / "networks.py").write_text(FACTORY)
    torch.manual_seed(2)
    data = [] if name == "digits" else data[:2]
    done("fetch", "--model", name, *data, "--run", "run")
    torch.manual_seed(2)  # the factory draws its weights anew each time: the file holds those of the export
    done("calibrate", "--model", name, *data, "--run", "run", "--n-examples", "60")
    path = done("export", "run", "--alpha", "0.3")
    if name != "digits":  # its header names code, and nobody who only loads a file has agreed to run it
        with pytest.raises(ArtifactError, match=r"(?s)names code.*allow_code=True"):
            load_sparsified(path)
    model, again = load_sparsified(path, allow_code=True), load_sparsified(path, allow_code=True)
    x = torch.rand(2, 1, 8, 8) if name == "digits" else IMAGES
    assert torch.equal(model(x), again(x))
    assert not torch.equal(model(x), load_sparsified(path, alpha=0, allow_code=True)(x))
    if name == "digits":
        from meansparse_cli.models.source import load_model, resolve_model

        assert torch.equal(load_sparsified(path, alpha=0)(x), load_model(resolve_model("digits"))(x))


def test_what_is_no_exported_file_is_refused(calibrated: nn.Module, data: list[str]) -> None:
    with pytest.raises(ArtifactError, match="operators but no network"):
        load_sparsified("run/statistics.safetensors")
    with pytest.raises(ArtifactError, match=r"(?s)is not a MeanSparse checkpoint.*meansparse export"):
        load_sparsified("weights.pt")


NONSENSE: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], object]] = {
    "std is not finite": lambda header, tensors: tensors["0000.std"].fill_(float("nan")),
    "std below 0": lambda header, tensors: tensors["0000.std"].fill_(-1),
    "mean is not finite": lambda header, tensors: tensors["0000.mean"][:1].fill_(float("inf")),
    "mean of another shape": lambda header, tensors: tensors.update({"0000.mean": torch.zeros(2, 2)}),
    "whole numbers": lambda header, tensors: tensors.update({"0000.mean": tensors["0000.mean"].long()}),
    "axis 7": lambda header, tensors: header["sites"][0].update(channel_axis=7),
    "axis 0": lambda header, tensors: header["sites"][0].update(channel_axis=0),
    "more channels": lambda header, tensors: header["sites"][0].update(channels=99),
    "a count too few": lambda header, tensors: header["counts"].pop(),
    "a count that is text": lambda header, tensors: header["counts"].__setitem__(0, "many"),
    "a negative count": lambda header, tensors: header["counts"].__setitem__(0, -4),
    "alpha below 0": lambda header, tensors: header.update(alpha=-1.0),
    "alpha is not finite": lambda header, tensors: header.update(alpha=float("nan")),
    "alpha is text": lambda header, tensors: header.update(alpha="0.2"),
    "an index that is text": lambda header, tensors: header["sites"][0].update(index="first"),
    "a layout nobody knows": lambda header, tensors: header["sites"][0].update(layout="diagonal"),
    "sites that are text": lambda header, tensors: header.update(sites=["act"]),
    "weights that are no list": lambda header, tensors: header.update(site_weights=3),
    "no model": lambda header, tensors: header.pop("model"),
    "a model of another form": lambda header, tensors: header.update(model={"name": "digits", "size": 3}),
    "a kind nobody knows": lambda header, tensors: header["model"].update(kind="magic"),
    "settings nobody takes": lambda header, tensors: header.update(network={"depth": 3}),
    "settings that are no settings": lambda header, tensors: header.update(network=[1]),
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_an_exported_file_of_nonsense_is_refused_in_words(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    base = load_model(resolve_model("digits"))
    sites = find_sites(base, torch.rand(2, 1, 8, 8))
    zeros = [torch.zeros(site.channels, dtype=torch.float64) for site in sites]
    statistics = tuple(ChannelStatistics(9, zero, zero + 1) for zero in zeros)
    source = resolve_model("digits")
    save_exported(
        path,
        source,
        base,
        Checkpoint(tuple(sites), statistics, "pooled", 0.1),
        {"settings": kind_of(source).network_settings(())},
    )
    assert load_sparsified(path)(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["meansparse"])
    tensors = load_file(path)
    NONSENSE[kind](header, tensors)
    save_file(tensors, path, {"meansparse": json.dumps(header)})
    with pytest.raises(ArtifactError, match="model.safetensors"):
        load_sparsified(path)


def test_a_card_of_a_run_has_measured_figures_or_none(calibrated: nn.Module, data: list[str]) -> None:
    empty = json.loads(done("export", "run", "--alpha", "0.25", "--card").read_text())
    assert set(empty) == CARD_FIELDS - {"external"}
    assert [empty[field] for field in ("clean_acc", "reported", "autoattack_acc", "eps")] == [""] * 4
    assert empty["unreliable"] is None
    assert empty["architecture"] == "MeanSparse WideResNet-94-16"
    assert empty["dataset"] == "cifar10"

    done(
        "evaluate", *data, "--eps", "2/255", "--alpha", "0.25", "--attack", "pgd-2", "--n-examples", "4", "--no-doubts"
    )
    plain = json.loads(done("export", "run", "--alpha", "0.25", "--card", "card.json").read_text())
    report = yaml.safe_load(Path("run/evaluate.yaml").read_text())["results"]
    rows: dict[str, Any] = {row["name"]: row for row in report["comparisons"]}
    assert plain["clean_acc"] == f"{100 * rows['clean']['sparsified_accuracy']:.2f}"
    assert plain["reported"] == f"{100 * rows['worst case']['sparsified_accuracy']:.2f}"
    assert (plain["autoattack_acc"], plain["unreliable"], plain["eps"]) == ("", True, "2/255")
    assert "external" not in plain
    assert shown_by_a_leaderboard(plain | {"autoattack_acc": "12.5"}) == 12.5
    assert "BPDA was not run" in plain["footnote"]
    assert "Measured in Linf on 4 of 10,000 test images of images.npz" in plain["footnote"]
    measured = ("--alpha", "0.25", "--attack", "pgd-2", "--n-examples", "4", "--no-doubts", "--fresh")
    done("evaluate", *data, *measured, "--eps", "0.5", "--norm", "L2")
    in_l2 = json.loads(done("export", "run", "--alpha", "0.25", "--card", "l2.json").read_text())
    assert "Measured in L2 on 4" in in_l2["footnote"]
    done("evaluate", *data, *measured, "--eps", "2/255", "--split", "held-out")
    refused = meansparse("export", "run", "--alpha", "0.25", "--card")
    assert refused.exit_code == 10 and "about test images" in said(refused) and "--split test" in said(refused)
    done("evaluate", *data, *measured, "--eps", "2/255")
    other = meansparse("export", "run", "--card", "--alpha", "0.1")
    assert other.exit_code == 10
    assert "evaluate.yaml is of alpha 0.25" in said(other)
    some = ("--sites", "published:0-3", "--centre", "zero", "--fresh")
    done(
        "evaluate",
        *data,
        "--eps",
        "2/255",
        "--alpha",
        "0.25",
        "--attack",
        "pgd-2",
        "--n-examples",
        "4",
        "--no-doubts",
        *some,
    )
    other = meansparse("export", "run", "--card", "--alpha", "0.25")
    assert other.exit_code == 10
    assert "operators at other sites" in said(other) and "--fresh" in said(other)


def test_a_card_says_what_bpda_left() -> None:
    """Eight images: AutoAttack leaves four of the sparsified model, BPDA two; of the base three are left."""

    def outcomes(**first_broken: list[int]) -> ModelOutcomes:
        broken = {name: np.isin(np.arange(8), first_broken.get(name.replace("-", "_"), [])) for name in attacks}
        everything = {name: np.ones(8, dtype=bool) for name in attacks}
        return ModelOutcomes(np.arange(8) > 0, everything, broken, {name: Spent() for name in attacks})

    attacks = ("apgd-ce", "apgd-t", "fab-t", "square", "bpda-apgd-ce", "transfer")
    evaluation = Evaluation(
        0.2,
        attacks[:-1],
        np.arange(8),
        np.zeros(8, dtype=np.int64),
        outcomes(apgd_ce=[1, 2], apgd_t=[3, 4]),
        outcomes(apgd_ce=[1, 2], square=[3], bpda_apgd_ce=[4, 5]),
    )
    report = {"results": evaluation.to_report() | {"eps": "4/255"}, "config": {"settings": {"dataset": None}}}
    source = ModelSource("Liu2023Comprehensive_Swin-L", "zoo", "imagenet", "Linf")
    site = Site(0, "act", "act", "module", "GELU", "tokens", 2, 4, (9, 4), False)
    checkpoint = Checkpoint((site,), (ChannelStatistics(1, torch.zeros(4), torch.ones(4)),), "pooled", 0.2)
    card = model_card(source, "Linf", checkpoint, report)
    assert card["clean_acc"] == "87.50"
    assert card["autoattack_acc"] == "50.00"
    assert card["reported"] == card["external"] == "25.00"
    assert shown_by_a_leaderboard(card) == 25.0
    assert (card["unreliable"], card["eps"], card["architecture"]) == (False, "4/255", "MeanSparse Swin-L")
    assert "8 of 5,000 test images with apgd-ce, apgd-t, fab-t, square, bpda-apgd-ce, transfer" in card["footnote"]
    assert "37.50% (paired difference -12.50 +-" in card["footnote"]


def test_unknown_formats_are_refused(calibrated: nn.Module) -> None:
    refused = meansparse("export", "run", "--alpha", "0.2", "--format", "onnx")
    assert refused.exit_code == 3
    assert "one of meansparse, robustbench, card" in said(refused)


def test_centre_and_site_weights_reach_robustbenchs_format(calibrated: nn.Module) -> None:
    statistics = load_checkpoint(Path("run/statistics.safetensors"))
    weights = (0.0, 0.5) + (1.0,) * 8
    base = kind_of(SOURCE).build(published_sites=True)
    base.load_state_dict(calibrated.state_dict())
    ours = sparsify(base.eval(), replace(statistics, alpha=0.4, site_weights=weights, centre="zero"))
    theirs = architecture(sparse=True).eval()
    theirs.load_state_dict(robustbench_state(SOURCE, ours), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IMAGES), ours(IMAGES))
        assert not torch.allclose(theirs(IMAGES), calibrated(IMAGES))
    first = theirs.get_submodule(ours.sites[0].path)
    assert ours.sites[0].index == 1
    assert not first.running_mean.any()  # type: ignore[operator, union-attr]
