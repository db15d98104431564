"""Names to models: exact, shortened, mistyped, of another data set; and the five kinds of model loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import Normalize

from meansparse_cli.errors import CheckpointError, ConfigError, DownloadError, ModelNotFound
from meansparse_cli.models import source, zoo
from meansparse_cli.models.fetch import fetch_weights
from meansparse_cli.models.networks import ResNet18
from meansparse_cli.models.source import ModelSource, kind_of, load_model, resolve_model

NETWORK = {"n_classes": 10, "width": 4, "activation": "silu", "in_channels": 1}


def write_network(path: Path, network: Any = NETWORK, **metadata: str) -> nn.Module:
    """A file as `meansparse train` writes it."""
    torch.manual_seed(3)
    model = ResNet18(**NETWORK).eval()  # type: ignore[arg-type]
    header = metadata if network is None else {"network": json.dumps(network), **metadata}
    save_file(model.state_dict(), path, metadata=header)
    return model


@pytest.mark.parametrize(
    ("name", "dataset", "threat", "found"),
    [
        ("digits", None, "Linf", ("digits", "embedded", "digits", "Linf")),
        ("resnet18-w16", "cifar10", "L2", ("resnet18-w16", "embedded", "cifar10", "L2")),
        ("Bartoldson2024", "cifar10", "Linf", ("Bartoldson2024Adversarial_WRN-94-16", "zoo", "cifar10", "Linf")),
        ("bartoldson2024adversarial", None, "linf", ("Bartoldson2024Adversarial_WRN-94-16", "zoo", "cifar10", "Linf")),
        (
            "bartoldson2024adversarial_wrn_82",
            None,
            "Linf",
            ("Bartoldson2024Adversarial_WRN-82-8", "zoo", "cifar10", "Linf"),
        ),
        ("Gowal2020Uncovering", None, "L2", ("Gowal2020Uncovering", "zoo", "cifar10", "L2")),
        ("carmon", None, "Linf", ("Carmon2019Unlabeled", "zoo", "cifar10", "Linf")),
        ("WANG2023BETTER_WRN_28", "cifar100", "Linf", ("Wang2023Better_WRN-28-10", "zoo", "cifar100", "Linf")),
        ("Peng2023", "imagenet", "Linf", ("Peng2023Robust", "zoo", "imagenet", "Linf")),
        ("Peng2023", "some/folder/of/images", "Linf", ("Peng2023Robust", "zoo", "cifar10", "Linf")),
        ("alexnet", "imagenet", "corruptions_3d", ("AlexNet", "zoo", "imagenet", "corruptions")),
        ("timm:resnet18", None, "Linf", ("timm:resnet18", "timm", "imagenet", "Linf")),
        ("torchvision:resnet18", None, "L2", ("torchvision:resnet18", "torchvision", "imagenet", "L2")),
        ("nets:make", "cifar100", "Linf", ("nets:make", "factory", "cifar100", "Linf")),
    ],
)
def test_a_name_means_one_model(name: str, dataset: str | None, threat: str, found: tuple[Any, ...]) -> None:
    assert resolve_model(name, dataset, threat) == ModelSource(*found)


def test_an_ambiguous_name_lists_what_it_can_mean() -> None:
    with pytest.raises(ModelNotFound, match="can mean 2") as raised:
        resolve_model("Wang2023Better", "cifar10", "Linf")
    assert "Wang2023Better_WRN-28-10" in str(raised.value) and "Wang2023Better_WRN-70-16" in str(raised.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Bartoldsen2024", "Bartoldson2024Adversarial"),
        ("Carmon2019Unlabelled", "Carmon2019Unlabeled"),
        ("digit", "digits"),
    ],
)
def test_a_mistyped_name_gets_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(ModelNotFound) as raised:
        resolve_model(name)
    assert raised.value.hint is not None and meant in raised.value.hint


def test_a_name_of_another_table_says_where_it_is() -> None:
    with pytest.raises(ModelNotFound) as raised:
        resolve_model("Salman2020Do_R18", None, "L2")
    assert "--model Salman2020Do_R18 --dataset imagenet --threat Linf" in str(raised.value)
    with pytest.raises(ModelNotFound, match="--dataset cifar10 --threat Linf"):
        resolve_model("Bartoldson2024", "imagenet", "Linf")


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="Linf, L2"):
        resolve_model("digits", None, "L7")
    with pytest.raises(ModelNotFound, match="nothing comes near"):
        resolve_model("xyzzyxyzzyxyzzy")
    with pytest.raises(ModelNotFound, match="timm:resnet18"):
        resolve_model("timm:resnet_18")
    with pytest.raises(ModelNotFound, match="torchvision:resnet18"):
        resolve_model("torchvision:resnet_18")


def test_a_trained_file_is_a_model_by_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    model = write_network(path, dataset="digits")
    images = torch.rand(2, 1, 8, 8)
    source = resolve_model(str(path))
    assert (source.kind, source.dataset) == ("embedded", "digits")
    for again in (load_model(source), load_model(resolve_model("digits"), path)):
        assert torch.equal(again(images), model(images))
        assert not again.training
    assert [file.origin for file in fetch_weights(source)] == [str(path)]
    with pytest.raises(CheckpointError, match="no file"):
        resolve_model(str(tmp_path / "absent.safetensors"))


def test_embedded_weights_come_from_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    with pytest.raises(CheckpointError, match="no weights for digits"):
        load_model(resolve_model("digits"))
    (tmp_path / "weights").mkdir()
    model = write_network(tmp_path / "weights" / "digits.safetensors")
    again = load_model(resolve_model("digits")).state_dict()
    assert all(torch.equal(again[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (None, "does not say which network"),
        ({"n_classes": 10, "depth": 4}, "describes no network"),
        ({**NETWORK, "n_classes": 100}, r"fc.weight \(10, 32\), expected \(100, 32\)"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(network: Any, says: str, tmp_path: Path) -> None:
    write_network(tmp_path / "mine.safetensors", network)
    with pytest.raises(CheckpointError, match=says):
        load_model(resolve_model("digits"), tmp_path / "mine.safetensors")


def test_half_a_safetensors_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    write_network(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load_model(resolve_model("digits"), path)


def test_zoo_models_need_weights_and_come_in_float32(tmp_path: Path) -> None:
    source = resolve_model("Hendrycks2020AugMix_WRN", "cifar10", "corruptions")
    with pytest.raises(CheckpointError, match="meansparse fetch --model Hendrycks2020AugMix_WRN --threat corruptions"):
        load_model(source)
    half = {
        k: v.half() if v.is_floating_point() else v for k, v in zoo.build_zoo_model(source.entry).state_dict().items()
    }
    torch.save(half, tmp_path / "weights.pt")
    model = load_model(source, tmp_path / "weights.pt")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training


def test_an_ensembles_files_are_found_by_name_by_folder_or_by_the_first(tmp_path: Path) -> None:
    model = kind_of(resolve_model("Chen2020Adversarial"))
    with pytest.raises(CheckpointError, match="holds 0 checkpoints, Chen2020Adversarial has 3"):
        model.paths(tmp_path)
    named = [tmp_path / f"Chen2020Adversarial.pt_m{i}.pt" for i in range(3)]
    for path in [*named, tmp_path / "zzz.pt"]:
        path.touch()
    assert model.paths(tmp_path) == model.paths(named[0]) == tuple(named)


FACTORY = """
import torch
from helper_of_the_factory import WIDTH
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(WIDTH, 2)
        self.train()
    def forward(self, x):
        return self.fc(x)
def broken():
    raise OSError("no such luck")
def number():
    return 3
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets_of_the_user.py").write_text(FACTORY)
    (tmp_path / "helper_of_the_factory.py").write_text("WIDTH = 3")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["nets_of_the_user:Net", "nets_of_the_user.py:Net"])
def test_a_factory_in_the_current_directory(project: Path, name: str) -> None:
    source = resolve_model(name)
    model = load_model(source)
    assert not model.training
    wanted = {k: torch.full_like(v, 0.25) for k, v in model.state_dict().items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in wanted.items()}}, project / "mine.pt")
    again = load_model(source, project / "mine.pt").state_dict()
    assert all(torch.equal(again[k], v) for k, v in wanted.items())
    torch.save({"other": torch.zeros(1)}, project / "other.pt")
    with pytest.raises(CheckpointError, match="2 of 2 tensors missing"):
        load_model(source, project / "other.pt")


def test_a_factory_file_in_another_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Postponed annotations need ``sys.modules``, a sibling its folder; what it prints is no path of a report."""
    elsewhere = project / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "sibling_of_the_factory.py").write_text("WIDTH = 3")
    (elsewhere / "nets.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nimport torch\n"
        "from sibling_of_the_factory import WIDTH\nprint('loading')\n"
        "@dataclass\nclass Size:\n    width: int = WIDTH\n"
        "def make(): return torch.nn.Linear(Size().width, 2)\n"
    )
    assert isinstance(load_model(resolve_model("elsewhere/nets.py:make")), nn.Linear)
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "loading\n")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nets_of_the_user:Nett", "has no 'Nett'\nit has Net"),
        ("nets_of_the_user:broken", "failed: OSError: no such luck"),
        ("nets_of_the_user:number", "gave int"),
        ("no_such_module_here:make", "no such module"),
        ("no_such_file.py:make", "no such module"),
        ("faulty_module_here:make", "importing it failed: ZeroDivisionError"),
    ],
)
def test_a_factory_that_fails_says_why(project: Path, name: str, says: str) -> None:
    (project / "faulty_module_here.py").write_text("1 / 0")
    with pytest.raises(ModelNotFound, match=says):
        load_model(resolve_model(name))


def assert_same_behind_normalisation(
    model: nn.Module, theirs: nn.Module, mean: Any, std: Any, size: Any = (64, 64)
) -> None:
    """The library's network on what torchvision's transform makes of pictures, ours on the pictures."""
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), theirs(Normalize(mean, std)(x)))


def test_timm_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    source = resolve_model("timm:test_vit") if timm.is_model("test_vit") else resolve_model("timm:resnet10t")
    bare = source.name.removeprefix("timm:")
    theirs = timm.create_model(bare).eval()
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    model = load_model(source, tmp_path / "weights.pth")
    assert not model.training
    facts = timm.data.resolve_data_config({}, model=theirs)
    assert_same_behind_normalisation(model, theirs, facts["mean"], facts["std"], facts["input_size"][1:])

    def no_network(name: str, pretrained: bool) -> nn.Module:
        raise OSError("cannot reach the hub")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(DownloadError, match="cannot reach the hub") as raised:
        load_model(source)
    assert raised.value.hint is not None and f"meansparse fetch --model {source.name} --from-file" in raised.value.hint


def test_torchvision_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import models

    source = resolve_model("torchvision:shufflenet_v2_x0_5")
    weights = tmp_path / "weights.pth"
    theirs = models.get_model("shufflenet_v2_x0_5").eval()
    torch.save(theirs.state_dict(), weights)
    model = load_model(source, weights)
    assert not model.training
    assert_same_behind_normalisation(model, theirs, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def no_network(name: str, weights: str) -> nn.Module:
        raise OSError("no way out")

    monkeypatch.setattr(models, "get_model", no_network)
    with pytest.raises(DownloadError, match="no way out") as raised:
        load_model(source)
    assert raised.value.hint is not None
    assert ".pth, then: meansparse fetch --model torchvision:shufflenet_v2_x0_5 --from-file" in raised.value.hint


def test_nobody_outside_the_package_asks_for_the_kind() -> None:
    """A new kind of model is a new class, and no other file changes."""
    package = Path(source.__file__).parent
    others = [path for path in package.parent.rglob("*.py") if package not in path.parents]
    assert len(others) > 50
    assert not [path.name for path in others if "source.kind" in path.read_text()]


@pytest.mark.parametrize("kind", source.KINDS, ids=lambda kind: kind.kind)
def test_every_kind_claims_its_own_names(kind: type[source.ModelKind]) -> None:
    names = {
        "embedded": "digits",
        "timm": "timm:resnet18",
        "torchvision": "torchvision:resnet18",
        "factory": "nets:make",
        "zoo": "Wong2020Fast",
    }
    found = resolve_model(names[kind.kind])
    assert type(kind_of(found)) is kind
    with pytest.raises(ConfigError, match="no kind of model 'other'"):
        kind_of(ModelSource("a", "other", "cifar10", "Linf"))  # type: ignore[arg-type]
