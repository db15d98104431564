"""Tars as WebDataset writes them, and Parquet as the Hub has it: the same images as in class folders."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from meansparse_cli.cli import app
from meansparse_cli.data.identity import content_id
from meansparse_cli.data.imagenet import class_numbers, evaluation_images
from meansparse_cli.data.read import FileImages
from meansparse_cli.data.splits import load_split
from meansparse_cli.errors import DataError

N, N_CLASSES = 40, 4


def picture(i: int, *, size: int = 8) -> bytes:
    rng, buffer = np.random.default_rng(i), io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_folders(place: Path, part: str, n: int = N) -> None:
    for i in range(n):
        file = place / part / str(i % N_CLASSES) / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_tars(place: Path, part: str, n: int = N) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for t in range(2):
        with tarfile.open(place / f"set-{part}-{t:04d}.tar", "w") as tar:
            for i in range(t * n // 2, (t + 1) * n // 2):
                add(tar, f"{i:04d}.png", picture(i))
                label = i % N_CLASSES
                if t:
                    add(tar, f"{i:04d}.json", json.dumps({"label": label}).encode())
                else:
                    add(tar, f"{i:04d}.cls", str(label).encode())


def write_table(file: Path, columns: dict[str, list[Any]], **options: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), file, **options)


def write_parquet(place: Path, part: str, n: int = N) -> None:
    for t in range(2):
        rows = range(t * n // 2, (t + 1) * n // 2)
        images = [{"bytes": picture(i), "path": f"{i:04d}.png"} for i in rows]
        columns = {"image": images, "label": [i % N_CLASSES for i in rows]}
        write_table(place / "data" / f"{part}-{t:05d}-of-00002.parquet", columns, row_group_size=7)


WRITERS = [write_tars, write_parquet]
Writer = Callable[..., None]


def by_pixels(images: Any) -> dict[bytes, int]:
    source = images.dataset
    return {source[i][0].numpy().tobytes(): source[i][1] for i in range(len(source))}


@pytest.mark.parametrize("write", WRITERS)
def test_the_same_images_as_in_folders(write: Writer, tmp_path: Path) -> None:
    for place, how in (("folders", write_folders), ("shards", write)):
        how(tmp_path / place, "train")
        how(tmp_path / place, "validation", 12)
    for split in ("calibration", "held-out", "test"):
        folders, shards = (load_split(str(tmp_path / p), None, split) for p in ("folders", "shards"))  # type: ignore[arg-type]
        assert len(folders) == len(shards) and by_pixels(folders) == by_pixels(shards)
    source = shards.dataset
    assert isinstance(source, FileImages) and source.n_classes == N_CLASSES
    again = pickle.loads(pickle.dumps(source))  # as a DataLoader worker gets it
    assert (again[5][0] == source[5][0]).all()
    write(tmp_path / "other", "train")
    write(tmp_path / "other", "validation", 13)
    assert content_id(load_split(str(tmp_path / "other"), None, "test")) != content_id(shards)


@pytest.mark.parametrize("write", WRITERS)
def test_the_images_of_robustbench_are_found(write: Writer, tmp_path: Path) -> None:
    wanted, numbers = evaluation_images()[:3], class_numbers()
    labels = [numbers[name.split("/")[0]] for name in wanted]
    backwards = list(enumerate(zip(wanted, labels, strict=True)))[::-1]
    if write is write_tars:
        with tarfile.open(tmp_path / "imagenet1k-validation-00.tar", "w") as tar:
            for i, (name, label) in [(9, ("n/ILSVRC2012_val_99999999.JPEG", 7)), *backwards]:
                add(tar, f"{Path(name).stem}.jpg", picture(i, size=300))
                add(tar, f"{Path(name).stem}.cls", str(label).encode())
    else:
        paths = [f"{Path(name).stem}_{name.split('/')[0]}.JPEG" for _, (name, _) in backwards]
        images = [{"bytes": picture(i, size=300), "path": p} for (i, _), p in zip(backwards, paths, strict=True)]
        write_table(
            tmp_path / "data" / "validation-00000-of-00001.parquet",
            {"image": images, "label": [label for _, (_, label) in backwards]},
        )
    test = load_split("imagenet", tmp_path, "test")
    assert [test[i][1] for i in range(len(test))] == labels
    assert test[0][0].shape == (3, 224, 224)


def test_a_command_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        write_tars(tmp_path / "d", part)
    Path("net.py").write_text(
        "from torch import nn\n\n\ndef make():\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))\n"
    )
    for n in ("0", "2"):
        words = ["calibrate", "--model", "net.py:make", "--dataset", "d", "--run", f"r{n}", "--workers", n]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
    assert Path("r0/statistics.safetensors").read_bytes() == Path("r2/statistics.safetensors").read_bytes()


def damaged(place: Path) -> None:
    (place / "train-0.tar").write_bytes(b"no tar" * 1000)


def cut_off(place: Path) -> None:
    write_tars(place, "train")
    file = place / "set-train-0001.tar"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])


def without_class(place: Path) -> None:
    with tarfile.open(place / "train-0.tar", "w") as tar:
        add(tar, "a.png", picture(0))


def without_pictures(place: Path) -> None:
    with tarfile.open(place / "train-0.tar", "w") as tar:
        add(tar, "a.txt", b"text")


def broken_class(place: Path) -> None:
    with tarfile.open(place / "train-0.tar", "w") as tar:
        add(tar, "a.png", picture(0))
        add(tar, "a.cls", b"\xff{")


def far_class(place: Path) -> None:
    with tarfile.open(place / "train-0.tar", "w") as tar:
        add(tar, "a.png", picture(0))
        add(tar, "a.cls", b"50000000")


def empty_table(place: Path) -> None:
    write_table(place / "train-0.parquet", {"image": [], "label": []})


def other_columns(place: Path) -> None:
    write_table(place / "train-0.parquet", {"text": ["a"]})


def secret_classes(place: Path) -> None:
    write_table(place / "train-0.parquet", {"image": [{"bytes": picture(0), "path": "a.png"}], "label": [-1]})


def paths_alone(place: Path) -> None:
    write_table(place / "train-0.parquet", {"image": [{"bytes": None, "path": "a.png"}], "label": [0]})


def no_table(place: Path) -> None:
    (place / "train-0.parquet").write_bytes(b"PAR1 no more")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (damaged, "not a readable tar"),
        (cut_off, "train-0001"),
        (without_class, "has no class"),
        (without_pictures, "no images"),
        (broken_class, "no class in it"),
        (far_class, "fewer than"),
        (empty_table, "no images"),
        (other_columns, "has the columns text"),
        (secret_classes, "class -1"),
        (paths_alone, "a path and no picture"),
        (no_table, "not a readable Parquet"),
    ],
)
def test_what_cannot_be_used_is_named(spoil: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    spoil(tmp_path)
    with pytest.raises(DataError, match=said):
        images = FileImages([*sorted(tmp_path.glob("*.tar")), *sorted(tmp_path.glob("*.parquet"))])
        for i in range(len(images)):
            images[i]


def test_other_classes_are_other_images(tmp_path: Path) -> None:
    seen = set()
    for shift in (0, 1):
        place = tmp_path / str(shift)
        place.mkdir()
        with tarfile.open(place / "set-0.tar", "w") as tar:
            for i in range(20):
                add(tar, f"{i}.png", picture(i))
                add(tar, f"{i}.cls", str((i + shift) % 3).encode())
        seen.add(content_id(load_split(str(place), None, "calibration")))
    assert len(seen) == 2
