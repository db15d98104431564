"""People's own pictures: every kind of file with the value it must have, every kind of folder with its classes."""

import os
import shutil
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from meansparse_cli.cli import app
from meansparse_cli.data.examples import stack_examples
from meansparse_cli.data.identity import content_id
from meansparse_cli.data.pictures import decode_picture
from meansparse_cli.data.read import ArrayImages, FileImages, open_images
from meansparse_cli.data.splits import DataSet, check_images, load_split
from meansparse_cli.engine.image_files import read_images, said_by
from meansparse_cli.errors import DataError
from tests.conftest import said

GREY, SMALL = np.array([[0, 20000], [40000, 65535]], np.uint16), (2, 2)


def decoded(folder: Path, image: Image.Image, name: str, **options: object) -> np.ndarray:
    image.save(folder / name, **options)
    return decode_picture((folder / name).read_bytes())


def deep_colour_png(values: np.ndarray) -> bytes:
    """A PNG of 16-bit colour, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_of_grey_are_scaled(suffix: str, tmp_path: Path) -> None:
    pixels = decoded(tmp_path, Image.fromarray(GREY), f"a.{suffix}")
    assert pixels.shape == (3, 2, 2) and pixels.dtype == np.float32
    assert np.array_equal(pixels, np.broadcast_to((GREY / 65535).astype(np.float32), (3, 2, 2)))


def test_big_endian_and_32_bit_tiffs_are_scaled(tmp_path: Path) -> None:
    for image in (
        Image.frombytes("I;16B", SMALL, GREY.astype(">u2").tobytes()),
        Image.fromarray(GREY.astype(np.int32)),
    ):
        assert np.allclose(decoded(tmp_path, image, "a.tif")[0], GREY / 65535, atol=1e-7)


def test_sixteen_bits_of_colour_are_scaled() -> None:
    values = np.stack([GREY, GREY[::-1], GREY.T], -1)
    pixels = decode_picture(deep_colour_png(values))
    assert np.abs(pixels.transpose(1, 2, 0) - values / 65535).max() <= 1 / 255
    assert pixels.max() == 1 and pixels.min() == 0


def test_floating_point_is_taken_as_it_is_or_refused(tmp_path: Path) -> None:
    values = np.array([[0, 0.25], [0.5, 1]], np.float32)
    assert np.array_equal(decoded(tmp_path, Image.fromarray(values), "a.tiff")[2], values)
    for wrong in (values * 255, values - 1, values * np.float32(np.nan)):
        with pytest.raises(ValueError, match="expected 0 to 1"):
            decoded(tmp_path, Image.fromarray(wrong), "a.tiff")
    with pytest.raises(ValueError, match="go from 0 to 131070, expected 0 to 65535"):
        decoded(tmp_path, Image.fromarray(GREY.astype(np.int32) * 2), "a.tiff")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr"])
def test_every_other_mode_is_as_torchvision_reads_it(mode: str, tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(colours).convert("P" if mode == "PA" else mode)
    image = image.convert(mode)
    name = "a.png" if mode in ("1", "L", "LA", "P", "RGBA") else "a.tif"
    pixels = decoded(tmp_path, image, name)
    expected = np.asarray(Image.open(tmp_path / name).convert("RGB")).transpose(2, 0, 1) / np.float32(255)
    assert np.array_equal(pixels, expected)


def test_alpha_is_dropped_and_orientation_left(tmp_path: Path) -> None:
    assert decoded(tmp_path, Image.new("RGBA", SMALL, (255, 0, 51, 0)), "a.png")[:, 0, 0].tolist() == pytest.approx(
        [1, 0, 0.2]
    )
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert decoded(tmp_path, Image.new("RGB", (3, 5)), "a.jpg", exif=exif).shape == (3, 5, 3)


def test_a_model_of_one_channel_gets_grey(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png")
    assert np.allclose(decode_picture((tmp_path / "a.png").read_bytes(), is_grey=True), GREY / 65535, atol=1e-7)
    Image.new("RGB", SMALL, (9, 8, 7)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="in colour"):
        decode_picture((tmp_path / "b.png").read_bytes(), is_grey=True)


def broken(folder: Path) -> dict[str, bytes]:
    Image.new("RGB", (64, 64), (1, 2, 3)).save(folder / "a.png")
    whole = (folder / "a.png").read_bytes()
    bomb = whole[:16] + struct.pack(">II", 30000, 30000) + whole[24:29]
    bomb += struct.pack(">I", zlib.crc32(bomb[12:29])) + whole[33:]
    bad_chunk = whole.replace(b"IDAT", b"\0\0\0\0")
    return {"bomb": bomb, "half": whole[:60], "chunk": bad_chunk, "empty": b"", "text": b"hello", "gif": b"GIF89a"}


@pytest.mark.parametrize("kind", ["bomb", "half", "chunk", "empty", "text", "gif"])
def test_what_cannot_be_read_is_named(kind: str, tmp_path: Path) -> None:
    content = broken(tmp_path)[kind]
    for name in ("cat/a.png", "dog/b.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        (tmp_path / "set" / name).write_bytes(content)
    with pytest.raises(DataError, match="cannot read image cat/a.png: "):
        open_images(tmp_path / "set")[0]


# ---- class folders


def pictures(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SMALL, (i, i, i + 1)).save(root / name)
    return root


def classes_of(images: FileImages) -> dict[str, int]:
    return dict(zip(images.names, images.labels, strict=True))


def zip_of(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(file, f"around/it/{file.relative_to(folder)}")
    return target


def test_the_class_is_the_first_folder(tmp_path: Path) -> None:
    root = pictures(tmp_path / "set", "dog/1.png", "dog/side/deep/2.png", "cat/side/3.png", "cat/top/4.tif")
    expected = {"cat/side/3.png": 0, "cat/top/4.tif": 0, "dog/1.png": 1, "dog/side/deep/2.png": 1}
    assert classes_of(FileImages(root)) == expected
    in_zip = classes_of(FileImages(zip_of(root, tmp_path / "set.zip")))
    assert in_zip == {f"around/it/{name}": label for name, label in expected.items()}


def test_what_is_no_class_is_left_out_and_named(tmp_path: Path) -> None:
    kept = ("cat/1.png", "dog/2.JPG")
    root = pictures(tmp_path / "set", *kept, ".ipynb_checkpoints/3.png", "__MACOSX/cat/._1.png", "cat/.hidden/4.png")
    pictures(root, "top.png", "dog/._2.png")
    (root / "empty").mkdir()
    (root / "cat" / "moving.gif").write_bytes(b"GIF89a")
    for images in (FileImages(root), FileImages(zip_of(root, tmp_path / "set.zip"))):
        assert [name.removeprefix("around/it/") for name in images.names] == list(kept)
        assert images.classes == ["cat", "dog"]
        words = " ".join(images.notes)
        for name in (".ipynb_checkpoints", "__MACOSX", "cat/.hidden", "dog/._2.png", "top.png", "cat/moving.gif"):
            assert name in words, name
        assert "/3.png" not in words
    assert "class folders without pictures: empty" in " ".join(FileImages(root).notes)


def test_whole_numbers_have_an_order(tmp_path: Path) -> None:
    root = pictures(tmp_path / "set", *(f"{i}/a.png" for i in (0, 1, 2, 10)))
    as_text, as_numbers = FileImages(root), FileImages(root, class_order="number")
    assert classes_of(as_text) == {"0/a.png": 0, "1/a.png": 1, "10/a.png": 2, "2/a.png": 3}
    assert classes_of(as_numbers) == {"0/a.png": 0, "1/a.png": 1, "10/a.png": 3, "2/a.png": 2}
    assert "(logit: folder): 0: 0, 1: 1, 2: 10, 3: 2; --class-order number" in as_text.notes[0]
    assert "(logit: folder): 0: 0, 1: 1, 2: 2, 3: 10; --class-order text" in as_numbers.notes[0]
    assert not FileImages(pictures(tmp_path / "few", "00/a.png", "01/a.png", "10/a.png")).notes
    ids = {content_id(DataSet(str(root), None, None, order).split("test")) for order in (None, "text", "number")}  # type: ignore[arg-type]
    assert len(ids) == 2


def test_a_picture_reached_twice_is_one(tmp_path: Path) -> None:
    root = pictures(tmp_path / "set", "ant/1.png", "bee/2.png", "bee/side/3.png")
    outside = pictures(tmp_path / "outside", "4.png", "more/5.png")
    (root / "ant" / "loop").symlink_to(root)
    (root / "ant" / "bees").symlink_to(root / "bee")
    (root / "ant" / "2.png").symlink_to(root / "bee" / "2.png")
    (root / "cow").symlink_to(outside)
    (root / "cow2").symlink_to(outside / "more")
    found = classes_of(FileImages(root))
    assert found == {"ant/1.png": 0, "bee/2.png": 1, "bee/side/3.png": 1, "cow/4.png": 2, "cow/more/5.png": 2}


def test_files_that_are_no_files_are_refused(tmp_path: Path) -> None:
    root = pictures(tmp_path / "set", "ant/1.png", "bee/2.png")
    os.mkfifo(root / "ant" / "pipe.png")
    with pytest.raises(DataError, match="is no picture, but a device, a FIFO"):
        FileImages(root)
    (root / "ant" / "pipe.png").unlink()
    for target, words in (("/dev/zero", "a device"), ("nowhere", "a link that leads nowhere")):
        (root / "bee" / "x.png").symlink_to(target)
        with pytest.raises(DataError, match=words):
            FileImages(root)
        (root / "bee" / "x.png").unlink()
    (root / "bee" / "round").symlink_to("round")
    with pytest.raises(DataError, match="cannot be read: Too many levels"):
        FileImages(root)
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(DataError, match="no regular file"):
        load_split(str(tmp_path / "pipe.npz"), None, "test")


def test_members_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    target = zip_of(pictures(tmp_path / "set", "ant/1.png", "bee/2.png"), tmp_path / "set.zip")
    content = target.read_bytes()
    for i, value, words in ((8, 1, "is encrypted"), (10, 77, "cannot read image")):
        changed = bytearray(content)
        place = content.index(b"PK\x01\x02")
        changed[place + i], changed[i - 2] = value, value
        target.write_bytes(bytes(changed))
        with pytest.raises(DataError, match=words):
            FileImages(target)[0]


def test_a_file_beyond_any_picture_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = pictures(tmp_path / "set", "ant/1.png", "bee/2.png")
    monkeypatch.setattr("meansparse_cli.data.read.LARGEST_FILE", 10)
    for source in (root, zip_of(root, tmp_path / "set.zip")):
        with pytest.raises(DataError, match="bytes, more than any picture"):
            FileImages(source)[0]


def test_a_folder_too_high_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "parts", "val/ant/1.png", "val/bee/2.png")
    with pytest.raises(DataError, match="holds val, which are parts") as refused:
        FileImages(tmp_path / "parts")
    assert f"--dataset {tmp_path / 'parts' / 'val'}" in str(refused.value)
    pictures(tmp_path / "around", "all/ant/1.png", "all/bee/2.png")
    with pytest.raises(DataError, match="one class folder, all, and folders in it: ant, bee"):
        FileImages(tmp_path / "around")


def test_a_test_set_of_fewer_classes_keeps_their_numbers(tmp_path: Path) -> None:
    pictures(tmp_path, "train/ant/1.png", "train/bee/2.png", "train/cow/3.png", "test/cow/4.png", "test/bee/5.png")
    test = load_split(str(tmp_path), None, "test")
    assert stack_examples(test)[1].tolist() == [1, 2] and test.dataset.n_classes == 3  # type: ignore[attr-defined]
    pictures(tmp_path, "test/dog/6.png")
    with pytest.raises(DataError, match="dog is in test only"):
        load_split(str(tmp_path), None, "test")


def test_big_folders_are_said_to_be_known_by_their_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = DataSet(str(pictures(tmp_path / "set", *(f"ant/{i}.png" for i in range(20)))), None)
    monkeypatch.setattr("meansparse_cli.data.read.READ_AT_MOST", 10)
    content_id(data.split("test"))
    assert "names and sizes alone" in data.notes[0]


# ---- arrays


def test_a_column_of_labels_is_taken_and_one_hot_is_not() -> None:
    x, y = np.zeros((6, 4, 4, 3), np.uint8), np.arange(6) % 3
    assert ArrayImages(x, y[:, None], source="x").y.tolist() == y.tolist()
    for wrong in (np.eye(3, dtype=int)[y], y[None], y[:5], np.array(3), y[:, None, None], y.astype(float)):
        with pytest.raises(DataError, match="y integers of shape"):
            ArrayImages(x, wrong, source="x")
    for odd in (x[..., :0], x[:, :0], x[0, 0], np.zeros((), np.uint8), x.astype(np.uint16)):
        with pytest.raises(DataError, match="expected x uint8"):
            ArrayImages(odd, y, source="x")


def test_spare_logits_are_noted() -> None:
    from torch.utils.data import Subset

    images = ArrayImages(np.zeros((6, 4, 4, 3), np.uint8), np.arange(6) % 3, source="x")
    for _ in range(2):
        check_images(Subset(images, range(6)), 7, (3, 4, 4), "mine")
    assert images.notes == ["mine: the model has 7 logits, the images are of 3 classes, numbered 0 to 2"]
    with pytest.raises(DataError, match="3 classes were found, the model has 2"):
        check_images(Subset(images, range(6)), 2, (3, 4, 4), "mine")


# ---- adversarial images


@pytest.mark.parametrize(
    "about", [{"eps": "much"}, {"eps": "nan"}, {"alpha": "-1"}, {"eps": "1e999"}, {"norm": "L[/]7"}, {"eps": ""}]
)
def test_metadata_that_means_nothing_is_refused(about: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "w.safetensors"
    save_file({"images": torch.zeros(2, 3, 4, 4)}, file, about | {"schema": "meansparse/witnesses/1"})
    with pytest.raises(DataError, match=f"its {next(iter(about))} is"):
        said_by(file)


def test_tensors_that_are_no_images_are_refused(tmp_path: Path) -> None:
    images, circle = torch.zeros(2, 3, 4, 4), []  # type: ignore[var-annotated]
    circle.append(circle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to give them up
        quantised = torch.quantize_per_tensor(images, 0.1, 0, torch.quint8)
    odd = (images.to_sparse(), quantised, images.to("meta"), circle)
    for content in (*odd, {"images": images, "indices": torch.tensor([True, False])}, images.to(torch.complex64)):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(DataError):
            read_images(tmp_path / "a.pt")


# ---- the commands

NETS = """
import torch
from torch import nn

class Brightness(nn.Module):
    def __init__(self, channels, levels):
        super().__init__()
        self.mix, self.act = nn.Conv2d(channels, 1, 1, bias=False), nn.ReLU()
        nn.init.constant_(self.mix.weight, 1 / channels)
        self.register_buffer("levels", torch.tensor(levels))
    def forward(self, x):
        return -(self.act(self.mix(x)).mean((2, 3)) - self.levels) ** 2 * 100

def grey(): return Brightness(1, [0.1, 0.4, 0.9])
"""


def test_a_grey_folder_goes_to_a_model_of_one_channel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "greynets.py").write_text(NETS)
    for part in ("train", "test"):
        for folder, level in (("0", 6553), ("2", 58981), ("10", 26214)):
            for i in range(12):
                file = tmp_path / "grey" / part / folder / "front" / f"{i}.tif"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((8, 8), level, np.uint16)).save(file)
    common = ["--model", "greynets.py:grey", "--run", "r", "--dataset", "grey"]
    done = CliRunner().invoke(app, ["calibrate", *common])
    assert done.exit_code == 0, done.output
    assert "2: 2; --class-order number" in said(done)
    assert "class_order" not in (tmp_path / "r" / "calibrate.yaml").read_text()
    measure = ["measure", "--run", "r", "--attack", "none", "--alphas", "0.1", "--eps", "8/255"]
    done = CliRunner().invoke(app, [*measure, "--class-order", "text"])
    assert done.exit_code == 0, done.output
    report = yaml.safe_load((tmp_path / "r" / "measurements" / "grid" / "measure.yaml").read_text())
    assert report["results"]["rows"][0]["clean"]["accuracy"] == 1
    assert report["config"]["settings"]["class_order"] == "text"
    assert "--class-order number" in report["results"]["data_notes"][0]
    done = CliRunner().invoke(app, [*measure, "--class-order", "number", "--name", "other"])
    report = yaml.safe_load((tmp_path / "r" / "measurements" / "other" / "measure.yaml").read_text())
    assert report["results"]["rows"][0]["clean"]["accuracy"] == pytest.approx(1 / 3)
    shutil.rmtree(tmp_path / "grey")
