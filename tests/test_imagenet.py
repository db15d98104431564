"""ImageNet from a made-up folder of a few pictures in its layout."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor
from typer.testing import CliRunner

from meansparse_cli.cli import app
from meansparse_cli.data.examples import stack_examples
from meansparse_cli.data.identity import content_id
from meansparse_cli.data.imagenet import ROBUSTBENCH, Preprocessing, class_numbers, evaluation_images
from meansparse_cli.data.splits import load_split
from meansparse_cli.errors import ConfigError, DataError
from meansparse_cli.models.source import kind_of, resolve_model
from tests.conftest import said

LISTED = evaluation_images()[:3]
SIZES = [(300, 280), (260, 400), (90, 120)]
FACTORY = """
from torch import nn

def net():
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.ReLU(), *pooled, nn.Linear(4, 1000))
"""


def picture(path: Path, size: tuple[int, int], seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "imagenet"
    for i, (name, size) in enumerate(zip(LISTED, SIZES, strict=True)):
        picture(root / "val" / name, size, i)
        picture(root / "val" / name.split("/")[0] / f"ILSVRC2012_val_9999{i}.JPEG", (60, 60), i)
    for i in range(20):
        wnid = LISTED[i % 2].split("/")[0]
        picture(root / "train" / wnid / f"{wnid}_{i}.JPEG", (250 + i, 300), i)
    return root


def test_the_list_and_the_classes_are_robustbenchs() -> None:
    assert len(evaluation_images()) == len(set(evaluation_images())) == 5000
    assert sorted(class_numbers().values()) == list(range(1000))
    assert {name.split("/")[0] for name in evaluation_images()} <= set(class_numbers())


def test_the_test_split_is_the_listed_images_in_their_order(folder: Path) -> None:
    test = load_split("imagenet", folder, "test")
    x, y = stack_examples(test)
    assert x.shape == (3, 3, 224, 224) and x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
    assert y.tolist() == [class_numbers()[name.split("/")[0]] for name in LISTED]
    assert [test.dataset.names[i] for i in test.indices] == list(LISTED)  # type: ignore[attr-defined]


def test_a_zip_gives_the_same(folder: Path) -> None:
    x, y = stack_examples(load_split("imagenet", folder, "test"))
    with zipfile.ZipFile(folder / "val.zip", "w") as archive:
        for file in sorted((folder / "val").rglob("*.JPEG")):
            archive.write(file, f"ILSVRC/{file.relative_to(folder)}")
    (folder / "val").rename(folder / "elsewhere")
    again, labels = stack_examples(load_split("imagenet", folder, "test"))
    assert torch.equal(x, again) and torch.equal(y, labels)


def test_a_part_of_robustbenchs_images_is_said_to_be_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_split("imagenet", folder, "test")
    assert "has 3 of RobustBench's 5,000 validation images" in said(capsys.readouterr().err)
    load_split("imagenet", folder, "calibration")
    assert "RobustBench" not in capsys.readouterr().err


def test_other_pictures_are_taken_whole(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / "val" / LISTED[0].split("/")[0] / f"mine_{i}.jpg", (230, 230), i)
    assert len(load_split("imagenet", tmp_path, "test")) == 4


def test_training_images_are_split_and_decoded_as_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    really = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: opened.append(self.name) or really(self))
    calibration, held_out = load_split("imagenet", folder, "calibration"), load_split("imagenet", folder, "held-out")
    assert len(calibration) == 18 and len(held_out) == 2 and not set(calibration.indices) & set(held_out.indices)
    assert calibration.dataset.n_classes == 1000  # type: ignore[attr-defined]
    monkeypatch.setattr("meansparse_cli.data.stores.READ_AT_MOST", 0)  # ImageNet's training images take 140 GB
    content_id(calibration)
    assert not opened
    image, label = calibration[0]
    assert image.shape == (3, 224, 224) and len(opened) == 1
    assert label in {class_numbers()[name.split("/")[0]] for name in LISTED}


def test_each_part_is_opened_by_itself(folder: Path) -> None:
    (folder / "train").rename(folder / "gone")
    assert len(load_split("imagenet", folder, "test")) == 3
    with pytest.raises(DataError, match="no train in"):
        load_split("imagenet", folder, "calibration")
    (folder / "val").rename(folder / "gone too")
    with pytest.raises(DataError, match="no val in"):
        load_split("imagenet", folder, "test")


@pytest.mark.parametrize("name", ROBUSTBENCH)
@pytest.mark.parametrize("size", [*SIZES, (288, 224), (500, 333)])
def test_preprocessing_is_robustbenchs(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    from meansparse_cli.models.zoo import zoo_entries

    zoo_entries()  # mends the import
    from robustbench.data import PREPROCESSINGS

    picture(tmp_path / "a.png", size)
    image = Image.open(tmp_path / "a.png").convert("RGB")
    assert torch.equal(to_tensor(ROBUSTBENCH[name].apply(image)), PREPROCESSINGS[name](image))


@pytest.mark.parametrize(
    ("model", "threat", "expected"),
    [
        ("Wong2020Fast", "Linf", Preprocessing(288, None)),
        ("Liu2023Comprehensive_Swin-L", "Linf", Preprocessing(224, 256, "bicubic")),
        ("Salman2020Do_R50", "Linf", Preprocessing(224, 256, "bilinear")),
        ("Debenedetti2022Light_XCiT-S12", "Linf", Preprocessing(224, 224, "bicubic")),
        ("torchvision:resnet18", "Linf", Preprocessing(224, 256, "bilinear")),
        ("torchvision:efficientnet_b4", "Linf", Preprocessing(380, 384, "bicubic")),
    ],
)
def test_each_model_has_its_own(model: str, threat: str, expected: Preprocessing) -> None:
    found = kind_of(resolve_model(model, "imagenet", threat)).preprocessing()
    assert found is not None
    assert (found.size, found.resize) == (expected.size, expected.resize)
    assert found.resize is None or found.interpolation == expected.interpolation


def test_other_data_sets_have_none() -> None:
    assert kind_of(resolve_model("digits")).preprocessing() is None
    assert kind_of(resolve_model("Wang2023Better_WRN-70-16", "cifar10", "L2")).preprocessing() is None


def test_the_stages_run_on_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FACTORY)
    common = ["--run", "run", "--device", "cpu"]
    data = ["--dataset", "imagenet", "--data-dir", str(folder)]
    done = CliRunner().invoke(app, ["calibrate", "--model", "net.py:net", *data, "--batch-size", "8", *common])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["evaluate", *common, "--alpha", "0.2", "--attack", "pgd-2", "--no-doubts"])
    assert done.exit_code == 0 and "3 test images, Linf 4/255" in said(done), done.output


def test_a_preprocessing_by_name_holds_for_every_stage(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(FACTORY)
    sizes: list[tuple[int, ...]] = []
    really = Preprocessing.apply
    monkeypatch.setattr(Preprocessing, "apply", lambda self, image: sizes.append((self.size,)) or really(self, image))
    model = ["--model", "net.py:net", "--dataset", "imagenet", "--data-dir", str(folder), "--batch-size", "8"]
    done = CliRunner().invoke(app, ["calibrate", *model, "--run", "run", "--preprocessing", "Crop288"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["evaluate", "--run", "run", "--alpha", "0.2", "--attack", "pgd-2", "--no-doubts"])
    assert done.exit_code == 0, done.output
    assert set(sizes) == {(288,)}
    done = CliRunner().invoke(app, ["calibrate", *model, "--run", "run", "--fresh"])
    assert done.exit_code == 0 and sizes[-1] == (224,)


def test_a_preprocessing_that_does_not_fit_the_data_set_is_refused() -> None:
    swin, digits = resolve_model("Liu2023Comprehensive_Swin-L", "imagenet", "Linf"), resolve_model("digits")
    assert kind_of(swin).preprocessing("Res224") == ROBUSTBENCH["Res224"]
    assert kind_of(digits).preprocessing("none") is None
    for source, name in ((swin, "none"), (digits, "Res224")):
        with pytest.raises(ConfigError, match=f"--preprocessing {name} with a model of {source.dataset}"):
            kind_of(source).preprocessing(name)
    unknown = CliRunner().invoke(app, ["calibrate", "--model", "digits", "--preprocessing", "Res225"])
    assert unknown.exit_code == 3 and "Res224" in unknown.stderr
