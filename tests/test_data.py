import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from meansparse_cli.data import examples
from meansparse_cli.data.examples import make_loader, stack_examples
from meansparse_cli.data.identity import content_id
from meansparse_cli.data.open import _open_digits
from meansparse_cli.data.read import ArrayImages
from meansparse_cli.data.splits import check_images, load_split, take_examples
from meansparse_cli.errors import DataError

SPLITS = ("calibration", "held-out", "test")


def image_folder(root: Path, n: int = 4, classes: tuple[str, ...] = ("cat", "ant")) -> Path:
    rng = np.random.default_rng(1)
    for label in classes:
        (root / label).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / label / f"{i}.png")
    return root


def zipped(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, f"{target.stem}/{file.relative_to(folder)}")
    return target


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    theirs, (train, test) = load_digits(), _open_digits()
    is_test = np.arange(1797) % 5 == 4
    for ours, which in ((train, ~is_test), (test, is_test)):
        assert isinstance(ours, ArrayImages)
        assert np.array_equal(np.asarray(ours.x).squeeze(), theirs.images[which] * 15)
        assert np.array_equal(ours.y, theirs.target[which]) and ours.y.dtype == theirs.target.dtype


def test_digits_splits_are_disjoint_and_complete() -> None:
    calibration, held_out, test = (load_split("digits", None, s) for s in SPLITS)  # type: ignore[arg-type]
    assert set(calibration.indices).isdisjoint(held_out.indices)
    assert len(calibration) + len(held_out) + len(test) == 1797
    assert calibration.dataset is not test.dataset
    x, y = stack_examples(test)
    assert x.shape == (359, 1, 8, 8)
    assert x.dtype == torch.float32
    assert 0 <= float(x.min()) < float(x.max()) <= 1
    assert sorted(set(y.tolist())) == list(range(10))


def test_one_unnamed_set_is_cut_in_three(npz: Path) -> None:
    parts = [set(load_split(str(npz), None, s).indices) for s in SPLITS]  # type: ignore[arg-type]
    assert [len(p) for p in parts] == [96, 12, 12]
    assert set.union(*parts) == set(range(120))


def test_folder_zip_and_npz_give_the_same_images(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "train", n=10)
    archive = zipped(folder, tmp_path / "pictures.zip")
    from_folder = stack_examples(load_split(str(folder), None, "calibration"))
    from_zip = stack_examples(load_split(str(archive), None, "calibration"))
    x = np.stack([np.asarray(Image.open(f)) for f in sorted(folder.rglob("*.png"))])
    y = np.array([sorted(["cat", "ant"]).index(f.parent.name) for f in sorted(folder.rglob("*.png"))])
    np.savez(tmp_path / "same.npz", x=x, y=y)
    from_npz = stack_examples(load_split(str(tmp_path / "same.npz"), None, "calibration"))
    for other in (from_zip, from_npz):
        assert torch.equal(from_folder[0], other[0])
        assert torch.equal(from_folder[1], other[1])


def test_train_and_test_side_by_side(tmp_path: Path) -> None:
    zipped(image_folder(tmp_path / "a", n=20), tmp_path / "train.zip")
    image_folder(tmp_path / "val", n=3)
    assert [len(load_split(str(tmp_path), None, s)) for s in SPLITS] == [36, 4, 6]  # type: ignore[arg-type]
    assert len(load_split("cifar10", tmp_path, "test")) == 6


def test_a_larger_number_contains_every_smaller_one(npz: Path) -> None:
    split = load_split(str(npz), None, "calibration")
    small, large = take_examples(split, 10, seed=3), take_examples(split, 40, seed=3)
    assert list(large.indices)[:10] == list(small.indices)
    assert list(take_examples(split, 10, seed=4).indices) != list(small.indices)
    with pytest.raises(DataError, match="97 examples were asked for, the split has 96"):
        take_examples(split, 97)


def test_loader_keeps_order_and_the_short_last_batch(npz: Path) -> None:
    split = load_split(str(npz), None, "held-out")
    batches = list(make_loader(split, 5))
    assert [len(y) for _, y in batches] == [5, 5, 2]
    assert torch.equal(torch.cat([x for x, _ in batches]), stack_examples(split)[0])


def test_workers_read_a_zip_that_was_read_before(tmp_path: Path) -> None:
    archive = zipped(image_folder(tmp_path / "a"), tmp_path / "a.zip")
    split = load_split(str(archive), None, "calibration")
    assert split[0]  # the archive is open now
    x = torch.cat([x for x, _ in make_loader(split, 2, n_workers=1)])
    assert torch.equal(x, stack_examples(split)[0])


def test_content_id_sees_a_changed_pixel(npz: Path, tmp_path: Path) -> None:
    before = content_id(load_split(str(npz), None, "test"))
    assert content_id(load_split(str(npz), None, "test")) == before
    arrays = dict(np.load(npz))
    arrays["x"][load_split(str(npz), None, "test").indices[0], 0, 0, 0] ^= 1
    np.savez(tmp_path / "other.npz", **arrays)
    assert content_id(load_split(str(tmp_path / "other.npz"), None, "test")) != before


def test_content_id_sees_a_picture_of_the_same_length(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "pictures", n=20)
    before = content_id(load_split(str(folder), None, "calibration"))
    for file in folder.rglob("*.png"):
        content = bytearray(file.read_bytes())
        content[-20] ^= 1
        file.write_bytes(content)
    assert content_id(load_split(str(folder), None, "calibration")) != before


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes:UserWarning")
def test_workers_do_not_share_the_place_in_an_open_zip(tmp_path: Path) -> None:
    archive = zipped(image_folder(tmp_path / "train", n=400), tmp_path / "pictures.zip")
    split = load_split(str(archive), None, "calibration")  # which looks into the zip, so that it is open in each worker
    assert torch.equal(stack_examples(split, 4)[0], stack_examples(split)[0])


@pytest.mark.parametrize("n_workers", [0, 1])
def test_pictures_of_several_sizes_are_refused_in_words(tmp_path: Path, n_workers: int) -> None:
    folder = image_folder(tmp_path / "pictures", n=20)
    some = sorted(folder.rglob("*.png"))[::2]
    for file in some:
        Image.fromarray(np.zeros((9, 11, 3), np.uint8)).save(file)
    with pytest.raises(DataError, match="images of several sizes"):
        stack_examples(load_split(str(folder), None, "calibration"), n_workers)


@pytest.mark.parametrize(
    ("dataset", "data_dir", "message"),
    [
        ("nowhere.npz", None, "no data set 'nowhere.npz'"),
        ("cifar10", None, "cifar10 needs a folder"),
        ("cifar10", "missing", "no folder"),
        ("cifar10", ".", "no images in"),
    ],
)
def test_missing_data(
    dataset: str, data_dir: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        load_split(dataset, Path(data_dir) if data_dir else None, "test")


def test_broken_files(tmp_path: Path) -> None:
    (tmp_path / "half.zip").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(DataError, match="not a readable zip"):
        load_split(str(tmp_path / "half.zip"), None, "test")
    np.savez(tmp_path / "floats.npz", x=np.zeros((20, 8, 8, 3)), y=np.zeros(20, dtype=int))
    with pytest.raises(DataError, match="x is float64"):
        load_split(str(tmp_path / "floats.npz"), None, "test")
    folder = image_folder(tmp_path / "pictures", n=10)
    for file in folder.rglob("*.png"):
        file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(DataError, match="cannot read image"):
        stack_examples(load_split(str(folder), None, "test"))


def test_wrong_size_and_class_count(npz: Path) -> None:
    split = load_split(str(npz), None, "test")
    check_images(split, 3, (3, 8, 8), "colours")
    with pytest.raises(DataError, match="images are 3 x 8 x 8, the model expects 3 x 32 x 32"):
        check_images(split, 3, (3, 32, 32), "colours")
    with pytest.raises(DataError, match="3 classes were found, the model has 2"):
        check_images(split, 2, (3, 8, 8), "colours")


def test_a_model_with_more_logits_than_classes_is_let_pass_with_a_note(
    npz: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_images(load_split(str(npz), None, "test"), 4, (3, 8, 8), "colours")
    assert "3 classes were found, the model has 4 logits" in caplog.text


def test_many_images_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = TensorDataset(torch.rand(200, 3, 8, 8), torch.arange(200) % 10)
    here = stack_examples(images)  # type: ignore[arg-type]
    monkeypatch.setattr(examples, "IN_MEMORY", 0)
    there = stack_examples(images, spill=tmp_path / "state" / "images")  # type: ignore[arg-type]
    assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])
    assert not list(tmp_path.rglob("images"))  # nothing is left, however the process ends
    assert f"{tmp_path}/state/images (deleted)" in Path("/proc/self/maps").read_text()
