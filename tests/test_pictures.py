"""Pictures and class folders as people have them: one right value for each kind."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from meansparse_cli.cli import app
from meansparse_cli.data.examples import stack_examples
from meansparse_cli.data.folders import in_order
from meansparse_cli.data.identity import content_id
from meansparse_cli.data.pictures import decode
from meansparse_cli.data.read import ArrayImages, FileImages, open_images
from meansparse_cli.data.splits import DataSet
from meansparse_cli.engine.image_files import read_images, said_by
from meansparse_cli.errors import DataError


def saved(pixels: np.ndarray, kind: str, mode: str | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(buffer, kind, **options)
    return buffer.getvalue()


def put(root: Path, name: str, value: int = 0, suffix_as: str = "PNG") -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(saved(np.full((4, 4, 3), value, np.uint8), suffix_as))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize(("level", "expected"), [(0, 0), (20000, 78), (40000, 156), (65535, 255)])
def test_sixteen_bits_are_scaled(kind: str, level: int, expected: int) -> None:
    image = decode(saved(np.full((4, 4), level, np.uint16), kind), "a")
    assert np.asarray(image).tolist() == np.full((4, 4, 3), expected).tolist()


def test_each_mode_has_one_rule() -> None:
    colour = np.full((4, 4, 3), (200, 100, 50), np.uint8)
    assert np.asarray(decode(saved(colour, "PNG"), "a"))[0, 0].tolist() == [200, 100, 50]
    with_alpha = np.dstack([colour, np.full((4, 4), 7, np.uint8)])
    assert np.asarray(decode(saved(with_alpha, "PNG"), "a"))[0, 0].tolist() == [200, 100, 50]
    assert np.asarray(decode(saved(colour, "PNG", "P"), "a")).shape == (4, 4, 3)
    assert np.asarray(decode(saved(np.full((4, 4), 255, np.uint8), "PNG", "1"), "a"))[0, 0].tolist() == [255] * 3
    cmyk = np.asarray(decode(saved(colour, "TIFF", "CMYK"), "a"))[0, 0]
    assert np.abs(cmyk.astype(int) - [200, 100, 50]).max() <= 2
    turned = Image.Exif()
    turned[0x0112] = 6
    wide = np.zeros((4, 8, 3), np.uint8)
    assert decode(saved(wide, "JPEG", exif=turned), "a").size == (8, 4)


@pytest.mark.parametrize("pixels", [np.ones((4, 4), np.float32), np.ones((4, 4), np.int32)])
def test_pixels_without_a_known_white_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(DataError, match="nobody knows what is white"):
        decode(saved(pixels, "TIFF"), "deep.tif")


@pytest.mark.parametrize("cut", [0, 5, 20, 45, 60])
def test_a_broken_picture_is_named(cut: int) -> None:
    content = saved(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8), "PNG")
    with pytest.raises(DataError, match="broken.png: cannot read image"):
        decode(content[:cut], "broken.png")


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="too many pixels"):
        decode(saved(np.zeros((5, 5, 3), np.uint8), "PNG"), "bomb.png")


def test_the_class_is_the_first_folder(tmp_path: Path) -> None:
    for i, (name, value) in enumerate([("dark/front/x", 10), ("dark/back/deep/y", 20), ("light/back/x", 220)]):
        put(tmp_path, f"{name}{i}.png", value)
    images = FileImages(tmp_path)
    assert images.classes == ["dark", "light"]
    assert sorted(zip(images.names, images.labels, strict=True)) == [
        ("dark/back/deep/y1.png", 0),
        ("dark/front/x0.png", 0),
        ("light/back/x2.png", 1),
    ]


def test_what_is_left_out_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a/1.png", "b/1.png", "a/.ipynb_checkpoints/1.png", ".hidden/1.png", "__MACOSX/a/1.png", "a/._1.png"):
        put(tmp_path, name)
    put(tmp_path, "a/2.gif", suffix_as="GIF")
    put(tmp_path, "outside.png")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe.png")
    images = FileImages(tmp_path)
    assert images.names == ["a/1.png", "b/1.png"]
    for word in ("a/.ipynb_checkpoints", ".hidden", "__MACOSX", "a/2.gif", "outside.png", "empty", "a/pipe.png"):
        assert word in caplog.text


def test_a_loop_is_walked_once_and_a_picture_reached_twice_is_one(tmp_path: Path) -> None:
    put(tmp_path / "set", "a/1.png")
    put(tmp_path / "set", "b/1.png", 9)
    (tmp_path / "set" / "a" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "a" / "0.png").symlink_to(tmp_path / "set" / "a" / "1.png")
    (tmp_path / "set" / "b" / "again").symlink_to(tmp_path / "set" / "b")
    assert FileImages(tmp_path / "set").names == ["a/1.png", "b/1.png"]
    put(tmp_path, "store/2.png", 5)
    (tmp_path / "set" / "b" / "2.png").symlink_to(tmp_path / "store" / "2.png")
    assert FileImages(tmp_path / "set").names == ["a/1.png", "b/1.png", "b/2.png"]


def test_whole_numbers_have_an_order(caplog: pytest.LogCaptureFixture) -> None:
    names = ["0", "1", "2", "10"]
    assert in_order(names, "text", "set") == ["0", "1", "10", "2"]
    assert "10 is logit 2" in caplog.text
    assert in_order(names, "number", "set") == names
    caplog.clear()
    assert in_order(["00", "01", "10"], "text", "set") == ["00", "01", "10"]
    assert not caplog.text
    with pytest.raises(DataError, match="'cat' is no whole number"):
        in_order(["cat", "1"], "number", "set")


@pytest.mark.parametrize(("channels", "shape"), [(1, (1, 4, 4)), (3, (3, 4, 4)), (None, (3, 4, 4))])
def test_grey_pictures_for_a_network_of_one_channel(
    tmp_path: Path, channels: int | None, shape: tuple[int, ...]
) -> None:
    for label in "ab":
        for i in range(10):
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / f"{i}.png").write_bytes(saved(np.full((4, 4), 30000, np.uint16), "PNG"))
    x, _ = stack_examples(DataSet(str(tmp_path), None, channels=lambda: channels).split("calibration"))
    assert tuple(x.shape[1:]) == shape
    assert torch.allclose(x, torch.tensor(117 / 255))


def test_a_test_part_with_fewer_classes_keeps_the_numbers_of_training(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "train/c/1.png", "test/a/1.png", "test/c/1.png"):
        put(tmp_path, name)
    assert DataSet(str(tmp_path), None).split("test").dataset.labels == [0, 2]  # type: ignore[attr-defined]
    put(tmp_path, "test/d/1.png")
    with pytest.raises(DataError, match="d is in test only"):
        DataSet(str(tmp_path), None).split("test")


def test_a_zip_is_read_like_the_folder_it_holds(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("set/a/x/1.png", "set/b/y/1.png", "__MACOSX/set/a/x/._1.png"):
            archive.writestr(name, saved(np.zeros((4, 4, 3), np.uint8), "PNG"))
    assert FileImages(tmp_path / "a.zip").classes == ["a", "b"]
    content = bytearray((tmp_path / "a.zip").read_bytes())
    for place in (content.index(b"PK\x03\x04") + 6, content.index(b"PK\x01\x02") + 8):
        content[place] |= 1  # says that it is encrypted
    (tmp_path / "locked.zip").write_bytes(content)
    with pytest.raises(DataError, match="encrypted"):
        FileImages(tmp_path / "locked.zip")[0]


def test_labels_in_a_column_are_taken_and_one_hot_is_not(tmp_path: Path) -> None:
    x, y = np.zeros((6, 4, 4, 3), np.uint8), np.arange(6) % 3
    np.savez(tmp_path / "column.npz", x=x, y=y[:, None])
    assert open_images(tmp_path / "column.npz")[4][1] == 1
    np.savez(tmp_path / "onehot.npz", x=x, y=np.eye(3, dtype=int)[y])
    with pytest.raises(DataError, match="one-hot"):
        open_images(tmp_path / "onehot.npz")
    for odd in ({"x": x[0, 0], "y": y}, {"x": x, "y": np.int64(3)}, {"x": x[None], "y": y}, {"x": x}):
        np.savez(tmp_path / "odd.npz", **odd)
        with pytest.raises(DataError):
            open_images(tmp_path / "odd.npz")


def link(file: Path, target: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to(target)


def test_what_a_link_leads_to_goes_by_its_own_name(tmp_path: Path) -> None:
    put(tmp_path / "set", "ant/z.png")
    put(tmp_path / "set", "bee/side/1.png", 9)
    put(tmp_path, "outside/more/2.png", 7)
    link(tmp_path / "set/ant/bees", "../bee")
    link(tmp_path / "set/ant/0.png", "../bee/side/1.png")
    link(tmp_path / "set/cow", "../outside")
    link(tmp_path / "set/dog", "../outside/more")
    link(tmp_path / "set/ant/round", "round")
    images = FileImages(tmp_path / "set")
    found = dict(zip(images.names, images.labels, strict=True))
    assert found == {"ant/z.png": 0, "bee/side/1.png": 1, "cow/more/2.png": 2}


def test_links_from_each_folder_to_each_other_take_no_time(tmp_path: Path) -> None:
    for i in range(12):
        put(tmp_path, f"{i}/1.png")
        for j in set(range(12)) - {i}:
            link(tmp_path / str(i) / f"to{j}", f"../{j}")
    assert len(FileImages(tmp_path)) == 12


@pytest.mark.parametrize("folders", [("val/ant", "val/bee"), ("all/ant", "all/bee"), ("test/ant", "train/ant")])
def test_a_folder_too_high_is_refused(folders: tuple[str, ...], tmp_path: Path) -> None:
    for folder in folders:
        put(tmp_path, f"{folder}/1.png")
    with pytest.raises(DataError, match="which is no class folder") as refused:
        FileImages(tmp_path)
    assert f"--dataset {tmp_path}/{folders[0].split('/')[0]}" in str(refused.value)


@pytest.mark.parametrize("name", ["pipe.npz", "pipe.zip", "pipe"])
def test_a_pipe_or_a_device_is_no_data_set(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    link(tmp_path / "zero.npz", "/dev/zero")
    for path in (tmp_path / name, tmp_path / "zero.npz", Path("/dev/zero")):
        with pytest.raises(DataError, match="a device or a pipe"):
            DataSet(str(path), None).split("test")


def test_a_file_that_cannot_be_read_is_named_when_the_split_is_opened(tmp_path: Path) -> None:
    put(tmp_path / "set", "a/1.png")
    with open(tmp_path / "set/a/0.png", "wb") as file:
        file.truncate(2**36)
    with pytest.raises(DataError, match=r"0.png: cannot read image: it has 68,719,476,736 bytes"):
        DataSet(str(tmp_path / "set"), None).split("calibration")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "set/a/1.png", "a/1.png")
    content = bytearray((tmp_path / "a.zip").read_bytes())
    for start, offset in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        content[content.index(start) + offset] = 77  # a compression that nobody has
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(DataError, match="a/1.png: cannot read image"):
        DataSet(str(tmp_path / "a.zip"), None).split("calibration")


def test_the_order_of_classes_tells_images_from_others(tmp_path: Path) -> None:
    for label in ("0", "2", "10"):
        put(tmp_path, f"{label}/1.png")
    by_text, by_number = (DataSet(str(tmp_path), None, order=order).split("test") for order in ("text", "number"))
    assert by_text.dataset.labels == [0, 1, 2] and by_number.dataset.labels == [0, 2, 1]  # type: ignore[attr-defined]
    assert content_id(by_text) != content_id(by_number)


def test_arrays_without_a_pixel_or_with_labels_out_of_range_are_refused() -> None:
    x, y = np.zeros((6, 4, 4, 3), np.uint8), np.arange(6) % 3
    for odd in (x[..., :0], x[:, :0], np.zeros((), np.uint8), x.astype(np.uint16)):
        with pytest.raises(DataError, match="expected x uint8"):
            ArrayImages(odd, y, source="x")
    with pytest.raises(DataError, match="labels run from 0"):
        ArrayImages(x, np.full(6, 2**64 - 1, np.uint64), source="x")


@pytest.mark.parametrize(
    "about",
    [{"eps": "much"}, {"eps": "nan"}, {"eps": "0"}, {"eps": "1e-300"}, {"alpha": "-1"}, {"eps": ""}, {"norm": "L[/]7"}],
)
def test_metadata_of_adversarial_images_that_means_nothing_is_refused(about: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"images": torch.zeros(2, 3, 4, 4)}, file, about | {"schema": "meansparse/witnesses/1"})
    with pytest.raises(DataError, match=f"its metadata says {next(iter(about))} "):
        said_by(file)


def test_tensors_that_are_no_plain_images_are_refused(tmp_path: Path) -> None:
    images, circle = torch.zeros(2, 3, 4, 4), list[object]()
    circle.append(circle)
    odd = (images.to_sparse(), images.to("meta"), images.to(torch.complex64), circle)
    for content in (*odd, {"images": images, "indices": torch.tensor([True, False])}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(DataError):
            read_images(tmp_path / "a.pt")


NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = nn.ReLU()

    def forward(self, x):
        levels = torch.tensor([0.1, 0.4, 0.9, 5])
        return -(self.act(x.mean(1, keepdim=True)).mean((2, 3)) - levels) ** 2 * 100
"""


def test_a_network_without_weights_is_right_on_deep_grey_pictures_in_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "brightness.py").write_text(NET)
    for i in range(36):
        label, level = [("0", 6553), ("10", 58982), ("2", 26214)][i % 3]
        for part in ("train", "test"):
            file = tmp_path / "set" / part / label / ("front", "back")[i % 2] / f"{i}.tif"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(saved(np.full((8, 8), level, np.uint16), "TIFF"))
    for order, accuracy in (("number", 1), ("text", 1 / 3)):
        given = ["--model", "brightness.py:Net", "--dataset", "set", "--class-order", order, "--run", order]
        assert CliRunner().invoke(app, ["calibrate", *given]).exit_code == 0
        measure = ["measure", "--run", order, "--attack", "none", "--alphas", "0.1", "--eps", "8/255"]
        assert CliRunner().invoke(app, measure).exit_code == 0
        report = yaml.safe_load((tmp_path / order / "measurements" / "grid" / "measure.yaml").read_text())
        assert report["results"]["rows"][0]["clean"]["accuracy"] == pytest.approx(accuracy)
