"""The check of the zoo: real entries pass, and every promise that is broken on purpose is noticed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from meansparse_cli.cli import app
from meansparse_cli.errors import ArtifactError
from meansparse_cli.models import check as model_check
from meansparse_cli.models.check import check_model
from meansparse_cli.models.names import ZooEntry
from meansparse_cli.models.published_sites import take_out
from meansparse_cli.models.zoo import build_zoo_model, zoo_entries
from meansparse_cli.operator.module import MeanSparse
from meansparse_cli.reporting.model_tables import checks_markdown
from meansparse_cli.stages import zoo_check
from tests.conftest import said

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def entry(name: str, dataset: str = "cifar10", threat: str = "Linf") -> ZooEntry:
    return ZooEntry(name, dataset, threat)


# A small entry of each architecture family: sites with gates, gates (None: known from nowhere else), image size.
SMALL = [
    (entry("Andriushchenko2020Understanding"), 16, 0, 32),  # PreActResNet-18, F.relu
    (entry("Sehwag2021Proxy_R18"), 17, 0, 32),  # ResNet-18
    (entry("Rebuffi2021Fixing_R18_ddpm"), 17, 0, 32),  # an activation that is an autograd function
    (entry("Hendrycks2020AugMix_WRN", threat="corruptions"), 37, 0, 32),  # WideResNet-40-2
    (entry("Hendrycks2020AugMix_ResNeXt", threat="corruptions"), 28, 0, 32),
    (entry("Engstrom2019Robustness"), 49, 0, 32),  # ResNet-50
    (entry("Debenedetti2022Light_XCiT-S12"), 29, None, 32),
    (entry("AlexNet", "imagenet", "corruptions"), 7, 0, 224),
    (entry("Singh2023Revisiting_ConvNeXt-T-ConvStem", "imagenet"), 20, 0, 64),
]
# The other families, and those whose counts the paper gives: sites without gates, gates.
LARGE = [
    (entry("Bartoldson2024Adversarial_WRN-94-16"), 91, 0),
    (entry("Wang2023Better_WRN-70-16"), 67, 0),
    (entry("Peng2023Robust"), 143, 142),
    (entry("Liu2023Comprehensive_ConvNeXt-L", "imagenet"), 36, 0),
    (entry("Liu2023Comprehensive_Swin-L", "imagenet"), 24, 0),
    (entry("Peng2023Robust", "imagenet"), 112, 74),
    (entry("Dai2021Parameterizing"), 25, 0),
    (entry("Kang2021Stable"), None, 0),
    (entry("Sehwag2021Proxy_ResNest152"), 153, 50),
    (entry("Chen2020Adversarial"), 147, 0),
    (entry("Bai2023Improving_edm"), None, None),
    (entry("Bai2024MixedNUTS", "imagenet"), None, 0),
    (entry("Huang2022Revisiting_WRN-A4"), None, None),
    (entry("Diffenderfer2021Winning_LRR_CARD_Deck", "cifar100", "corruptions"), 102, 0),
    (entry("Standard_R50", "imagenet"), 49, 0),
    (entry("Tian2022Deeper_DeiT-S", "imagenet", "corruptions"), 12, 0),
    (entry("Singh2023Revisiting_ViT-S-ConvStem", "imagenet"), 16, 0),
    (entry("Xu2024MIMIR_Swin-B", "imagenet"), 24, 0),
    (entry("Amini2024MeanSparse_Ra_WRN_70_16"), 143, 142),
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:robustbench")  # its Swish uses ctx.saved_variables
@pytest.mark.parametrize(("which", "n_all", "n_gates", "size"), SMALL, ids=lambda v: getattr(v, "name", None))
def test_a_small_entry_of_each_family(
    which: ZooEntry, n_all: int, n_gates: int | None, size: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    facts, problems = check_model(build_zoo_model(which), torch.rand(2, 3, size, size), tmp_path / "c.safetensors")
    assert problems == []
    assert facts["n_sites"] + facts["n_gates"] == facts["n_confirmed"] == n_all
    assert n_gates is None or facts["n_gates"] == n_gates


@pytest.mark.slow
@pytest.mark.parametrize(("which", "n_sites", "n_gates"), LARGE, ids=lambda v: getattr(v, "name", None))
def test_the_other_families_and_the_papers_counts(which: ZooEntry, n_sites: int | None, n_gates: int | None) -> None:
    row = model_check.check_entry(which)
    assert row["problems"] == []
    assert n_sites in (None, row["n_sites"]) and n_gates in (None, row["n_gates"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dataset"),
    [
        ("Bai2023Improving_edm", "cifar10"),
        ("Bai2023Improving_edm", "cifar100"),
        ("Bai2023Improving_trades", "cifar100"),
    ],
)
def test_what_calls_cuda_is_built_without(name: str, dataset: str) -> None:
    assert all(p.device.type == "cpu" for p in build_zoo_model(entry(name, dataset)).parameters())


@pytest.mark.parametrize("threat", ["Linf", "corruptions"])
def test_what_downloads_is_built_without(threat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    assert sum(p.numel() for p in build_zoo_model(entry("Standard_R50", "imagenet", threat)).parameters()) == 25_557_032


# ---- broken on purpose


class Net(nn.Module):
    """As many channels as rows and columns: shapes alone do not tell the channel axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act, self.head = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Linear(8, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.norm(self.conv(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Faded(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1e-9 + 1


class Rewriting(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.head.weight.data = self.head.weight * 1.001
        return super().forward(x)


class ZeroBranch(Net):
    """A branch that starts as nothing, as with a layer scale of 1e-6 or a head of zeros; a setting that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.beta = nn.Parameter(torch.full((8,), 1e-6)), nn.Parameter(torch.full((1,), 1e-8))
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.act(self.norm(100 * self.conv(x) + 5)).mean((2, 3)) * self.scale
        return self.head(branch) / (1 - self.beta)  # type: ignore[no-any-return]


class Published(Net):
    """With an operator as RobustBench's architectures hold them."""

    def __init__(self) -> None:
        super().__init__()
        place = nn.Identity()
        for name, value in (
            ("running_mean", torch.zeros(8)),
            ("running_var", torch.ones(8)),
            ("threshold", torch.zeros(())),
        ):
            place.register_buffer(name, value)
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.place(self.act(self.norm(self.conv(x)))).mean((2, 3)))  # type: ignore[no-any-return]


class NoGradient(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x * 0).sqrt().sum()


def problems_of(net: nn.Module, tmp_path: Path) -> list[str]:
    return check_model(net.eval(), IMAGES, tmp_path / "c.safetensors")[1]


def test_a_sound_network_passes(tmp_path: Path) -> None:
    facts, problems = check_model(Net().eval(), IMAGES, tmp_path / "c.safetensors")
    assert problems == []
    assert facts == {
        "parameters": 8 * 27 + 8 + 16 + 36,
        "n_sites": 1,
        "n_gates": 0,
        "n_confirmed": 1,
        "operations": {"ReLU": 1},
        "layouts": {"channels-first": 1},
    }


@pytest.mark.parametrize(("net", "expected"), [(Faded, "features"), (NoGradient, "gradients")])
def test_degenerate_networks_are_noticed(net: type[nn.Module], expected: str, tmp_path: Path) -> None:
    assert any(p.startswith(expected) for p in problems_of(net(), tmp_path))


def test_settling_wakes_what_starts_at_zero() -> None:
    net = ZeroBranch().eval()
    assert model_check.settle(net, IMAGES) == []
    with torch.no_grad():
        assert bool((net.scale == 1).all()) and float(net.beta) == pytest.approx(1e-8)
        features = net.norm(100 * net.conv(IMAGES) + 5)
        assert float(features.mean((0, 2, 3)).abs().max()) < 1e-3
        assert bool((features.std((0, 2, 3)) > 0.5).all())
        assert float(net(IMAGES).std()) > 1e-3
    assert not net.norm._forward_pre_hooks


def test_the_places_of_published_operators_are_checked_too(tmp_path: Path) -> None:
    facts, problems = check_model(take_out(Published().eval()), IMAGES, tmp_path / "c.safetensors")
    assert problems == []
    assert (facts["n_sites"], facts["n_confirmed"], facts["operations"]) == (1, 2, {"ReLU": 1, "MeanSparse": 1})


def test_a_network_that_rewrites_its_weights_is_held_still(tmp_path: Path) -> None:
    net = Rewriting().eval()
    assert not torch.equal(net(IMAGES), net(IMAGES))
    facts, problems = check_model(net, IMAGES, tmp_path / "c.safetensors")
    assert problems == [] and facts["rewrites"] == ["head.weight"]
    assert not net._forward_pre_hooks
    row = row_of(zoo_entries()[0], []) | {"rewrites": ["head.weight"]}
    assert "passed (head.weight put back before each pass)" in page_of([row])


def _not_identical_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = MeanSparse.forward
    monkeypatch.setattr(MeanSparse, "forward", lambda self, x: forward(self, x) * (1 + 1e-6))


def _wrong_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    found = model_check.find_sites
    monkeypatch.setattr(model_check, "find_sites", lambda *a: [replace(s, channel_axis=2) for s in found(*a)])


def _wrong_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    real = model_check.calibrate_channels
    monkeypatch.setattr(
        model_check, "calibrate_channels", lambda *a, **k: [replace(s, mean=s.mean + 0.01) for s in real(*a, **k)]
    )


def _no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_check, "set_alpha", lambda *a: None)


def _hook_left(monkeypatch: pytest.MonkeyPatch) -> None:
    real = model_check.remove

    def remove(model: Any) -> nn.Module:
        base = real(model)
        base.register_forward_hook(lambda *a: None)
        return base

    monkeypatch.setattr(model_check, "remove", remove)


def _key_left(monkeypatch: pytest.MonkeyPatch) -> None:
    real = model_check.remove

    def remove(model: Any) -> nn.Module:
        base = real(model)
        base.register_buffer("left", torch.zeros(1))
        return base

    monkeypatch.setattr(model_check, "remove", remove)


def _weights_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = model_check.remove

    def remove(model: Any) -> nn.Module:
        base = real(model)
        torch.nn.init.zeros_(base.head.bias)
        return base

    monkeypatch.setattr(model_check, "remove", remove)


def _other_alpha_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    real = model_check.load_checkpoint
    monkeypatch.setattr(model_check, "load_checkpoint", lambda path: replace(real(path), alpha=0.21))


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (_not_identical_at_zero, "alpha 0: logits differ"),
        (_wrong_axis, "channel axis: act: 8 channels on axis 2, but NativeBatchNormBackward0 gave 8 on axis 1"),
        (_wrong_statistics, "statistics: act: mean or deviation"),
        (_no_effect, "alpha 0.2: the output did not change"),
        (_hook_left, "remove: 1 hooks are left"),
        (_key_left, "remove: left in the state dict: ['left']"),
        (_weights_changed, "remove: logits differ"),
        (_other_alpha_saved, "save and load: logits differ"),
    ],
)
def test_a_broken_promise_is_noticed(
    spoil: Callable[[pytest.MonkeyPatch], None], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch)
    assert any(p.startswith(expected) for p in problems_of(Net(), tmp_path))


# ---- the report


def row_of(which: ZooEntry, problems: list[str]) -> dict[str, Any]:
    return {
        "name": which.name,
        "dataset": which.dataset,
        "threat": which.threat,
        "parameters": 1_000_000,
        "n_sites": 5,
        "n_gates": 0,
        "n_confirmed": 5,
        "operations": {"relu()": 5},
        "layouts": {"channels-first": 5},
        "problems": problems,
        "seconds": 1.0,
    }


def page_of(rows: list[dict[str, Any]]) -> str:
    versions = dict.fromkeys(("torch", "robustbench", "python"), "1")
    made_with = {"versions": versions, "platform": "Linux", "seconds": 90.0, "command": "meansparse zoo-check"}
    return checks_markdown(rows, made_with, 1.0)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A check without networks: which entries were checked, which of them fail, at which Ctrl-C is pressed."""
    state: dict[str, Any] = {"names": [], "failing": (), "interrupt_at": None}

    def check_entry(which: ZooEntry) -> dict[str, Any]:
        if which.name == state["interrupt_at"]:
            raise KeyboardInterrupt
        state["names"].append(which.name)
        return row_of(which, ["alpha 0: no"] if which.name in state["failing"] else [])

    monkeypatch.setattr(model_check, "check_entry", check_entry)
    return state


def meansparse(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})


def test_a_check_that_was_killed_goes_on(checked: dict[str, Any], tmp_path: Path) -> None:
    command = ["models", "--check", "--model", "wang2023better*", "--dataset", "cifar10", "--run", str(tmp_path)]
    names = ["Wang2023Better_WRN-28-10", "Wang2023Better_WRN-70-16"] * 2  # Linf, then L2
    checked["interrupt_at"] = names[1]
    assert meansparse(*command).exit_code == 130
    assert checked["names"] == names[:1]
    checked["interrupt_at"], checked["failing"] = None, (names[1],)
    result = meansparse(*command)
    assert result.exit_code == 1 and "2 of 4 passed" in said(result) and "alpha 0: no" in said(result)
    assert result.stdout == f"{tmp_path / 'zoo-check.yaml'}\n"
    assert checked["names"] == names
    checked["failing"] = ()
    assert meansparse(*command).exit_code == 0
    assert checked["names"] == names + [names[1], names[3]]  # only what had failed
    report = yaml.safe_load((tmp_path / "zoo-check.yaml").read_text())
    assert (report["results"]["n_models"], report["results"]["n_passed"]) == (4, 4)
    page = (tmp_path / "zoo-check.md").read_text()
    assert (
        "4 of 4 passed" in page and "| Wang2023Better_WRN-70-16 | cifar10 | L2 | 1.0 | 5 | 0 | 5 | relu() 5 |" in page
    )
    assert meansparse(*command, "--fresh").exit_code == 0
    assert checked["names"][-4:] == names


def test_shards_are_taken_over(checked: dict[str, Any], tmp_path: Path) -> None:
    command = ["models", "--check", "--model", "wang2023better*", "--dataset", "cifar10", "--run", str(tmp_path)]
    names = ["Wang2023Better_WRN-28-10", "Wang2023Better_WRN-70-16"]
    part = meansparse(*command, "--shard", "2/2")
    assert part.stdout == f"{tmp_path / 'shards/shard-2-of-2/zoo-check.yaml'}\n"
    assert checked["names"] == names[1:] * 2, "every second entry, Linf and L2"
    assert meansparse(*command, "--shard", "2/3").exit_code == 0
    assert checked["names"] == names[1:] * 2, "another number of shards leaves out what is known"
    assert meansparse(*command).exit_code == 0
    assert checked["names"] == names[1:] * 2 + names[:1] * 2
    report = yaml.safe_load((tmp_path / "zoo-check.yaml").read_text())
    assert (report["results"]["n_models"], report["results"]["n_passed"]) == (4, 4)
    assert not (tmp_path / "shards").exists()
    checked["failing"] = (names[0],)
    assert meansparse(*command, "--shard", "1/2", "--fresh").exit_code == 1
    assert checked["names"] == names[1:] * 2 + names[:1] * 4
    gathered = meansparse(*command)
    assert gathered.exit_code == 1 and "2 of 4 passed" in said(gathered), "what failed now is not what passed before"
    assert checked["names"] == names[1:] * 2 + names[:1] * 4
    assert meansparse(*command, "--shard", "2/2").stdout.strip() == str(tmp_path / "shards/shard-2-of-2/zoo-check.yaml")
    assert (tmp_path / "shards/shard-2-of-2/zoo-check.yaml").exists(), "a shard with nothing to do reports that"


@pytest.mark.slow
def test_two_at_a_time_find_what_one_finds(tmp_path: Path) -> None:
    entries = [entry("Wong2020Fast"), entry("Andriushchenko2020Understanding")]
    _, together = zoo_check.check_zoo(entries, tmp_path / "two", n_jobs=2)
    _, alone = zoo_check.check_zoo(entries, tmp_path / "one")
    assert [row["name"] for row in together] == [e.name for e in entries]
    assert [row | {"seconds": 0} for row in together] == [row | {"seconds": 0} for row in alone]


def test_other_versions_and_edited_reports(
    checked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = [ZooEntry("Standard", "cifar10", "Linf")]
    path, _ = zoo_check.check_zoo(one, tmp_path)
    zoo_check.check_zoo(one, tmp_path)
    assert checked["names"] == ["Standard"]
    monkeypatch.setattr(zoo_check, "versions", lambda: {"torch": "9"})
    zoo_check.check_zoo(one, tmp_path)
    assert checked["names"] == ["Standard", "Standard"]
    path.write_text(path.read_text().replace("n_sites: 5", "n_sites: 6"))
    with pytest.raises(ArtifactError, match="changed after"):
        zoo_check.check_zoo(one, tmp_path)


@pytest.mark.parametrize("option", [("--shard", "1/2"), ("--jobs", "2"), ("--run", "x"), ("--fresh",)])
def test_an_option_of_the_check_is_refused_without_it(option: tuple[str, ...]) -> None:
    result = meansparse("models", *option)
    assert result.exit_code == 3 and result.stdout == ""
    assert f"{option[0]} without --check" in said(result)


def test_only_zoo_entries_are_checked() -> None:
    result = meansparse("models", "--check", "--dataset", "digits")
    assert result.exit_code == 4 and "no entry of RobustBench's zoo" in said(result)


def test_whatever_a_network_does_becomes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(which: ZooEntry) -> nn.Module:
        raise RuntimeError("no such layer\nand more")

    monkeypatch.setattr("meansparse_cli.models.zoo.build_zoo_model", build)
    row = model_check.check_entry(zoo_entries()[0])
    assert row["problems"] == ["RuntimeError: no such layer"]
    assert "no such layer" in page_of([row])
