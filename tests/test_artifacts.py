"""Files and reports: whole or not there, and refused once they were changed."""

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from meansparse_cli.errors import ArtifactError, StorageError
from meansparse_cli.files import atomic_write, discard, load_torch, save_tensors, save_torch, sha256_of, write_bytes
from meansparse_cli.models.networks import ResNet18
from meansparse_cli.operator.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from meansparse_cli.operator.statistics import ChannelStatistics
from meansparse_cli.runs.report import read_report, verify_outputs, write_report
from meansparse_cli.sites.find import find_sites


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_bytes(target, b"old")
    with pytest.raises(StorageError, match="No space left") as caught, atomic_write(target) as temporary:
        temporary.write_bytes(b"half of the n")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert "type the same command again" in str(caught.value)


def test_torch_state_round_trip_and_damage(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    save_torch(file, {"x": torch.arange(3), "name": "a"})
    assert torch.equal(load_torch(file)["x"], torch.arange(3))
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ArtifactError, match="is damaged"):
        load_torch(file)


def test_equal_tensors_give_equal_bytes_though_the_library_shuffles_metadata(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(3, 5), "b": torch.arange(7), "c": torch.rand(1).bfloat16()}
    metadata = {f"key {i}": "näme, \U0001f600" * i for i in range(8)}
    assert len({save(tensors, metadata) for _ in range(20)}) > 1
    written = set()
    for _ in range(20):
        save_tensors(tmp_path / "f.safetensors", tensors, metadata)
        written.add((tmp_path / "f.safetensors").read_bytes())
    assert len(written) == 1
    with safe_open(tmp_path / "f.safetensors", "pt") as file:
        assert file.metadata() == metadata
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor) and file.get_tensor(name).dtype == tensor.dtype


def test_a_discarded_folder_is_gone_whole_whatever_was_left_by_a_kill(tmp_path: Path) -> None:
    folder, leftover = tmp_path / "state", tmp_path / "state.discarded"
    for one in (folder, leftover):
        (one / "deep").mkdir(parents=True)
        (one / "deep" / "file").write_text("x")
    discard(folder)
    assert not any(tmp_path.iterdir())
    discard(folder)  # nothing there: nothing to do


def report(path: Path, **changes: Any) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "stage": "calibrate",
        "config": {"settings": {"seed": 0}},
        "inputs": {},
        "outputs": {},
        "results": {"n": 3},
        "device": "cpu",
        "seconds": 1.0,
    }
    return write_report(path, **(parts | changes))


def test_report_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "calibrate.yaml"
    written = report(path)
    assert read_report(path, "calibrate", mend="x") == written
    assert written["provenance"]["versions"]["torch"]


@pytest.mark.parametrize(
    ("old", "new"), [("n: 3", "n: 4"), ("seed: 0", "seed: 1"), ("content_sha256: ", "content_sha256: 0")]
)
def test_an_edited_report_is_refused(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "calibrate.yaml"
    report(path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ArtifactError, match="was changed after it was written") as caught:
        read_report(path, "calibrate", mend="meansparse calibrate --run x")
    assert str(caught.value).endswith("meansparse calibrate --run x")  # nothing that is kept is thrown away


def test_missing_foreign_and_garbled_reports_name_the_command(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no calibrate.yaml") as caught:
        read_report(tmp_path / "calibrate.yaml", "calibrate", mend="meansparse calibrate --run x")
    assert caught.value.hint == "run: meansparse calibrate --run x"
    report(tmp_path / "fetch.yaml")
    with pytest.raises(ArtifactError, match="schema is 'meansparse/calibrate/1'"):
        read_report(tmp_path / "fetch.yaml", "fetch", mend="x")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ArtifactError, match="not YAML"):
        read_report(tmp_path / "bad.yaml", "fetch", mend="x")


def test_changed_and_missing_outputs_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "statistics.safetensors"
    file.write_bytes(b"one")
    written = report(tmp_path / "calibrate.yaml", outputs={file.name: sha256_of(file)})
    verify_outputs(written, tmp_path, mend="x")
    file.write_bytes(b"two")
    with pytest.raises(ArtifactError, match="sha256 differs"):
        verify_outputs(written, tmp_path, mend="x")
    file.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        verify_outputs(written, tmp_path, mend="x")


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    sites = find_sites(ResNet18(n_classes=10, width=2), torch.rand(2, 3, 16, 16))
    statistics = [
        ChannelStatistics(7, torch.randn(s.channels).double(), torch.rand(s.channels).double()) for s in sites
    ]
    saved = Checkpoint(tuple(sites), tuple(statistics), "pooled", 0.15)
    save_checkpoint(tmp_path / "m.safetensors", saved)
    loaded = load_checkpoint(tmp_path / "m.safetensors")
    assert (loaded.sites, loaded.alpha, loaded.estimator) == (saved.sites, 0.15, "pooled")
    for a, b in zip(saved.statistics, loaded.statistics, strict=True):
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.std, b.std)
    assert saved.in_words(0.15) == "alpha 0.15"
    n = len(sites)
    some = replace(saved, site_weights=(0.0, 0.5) + (1.0,) * (n - 2), centre="zero", spread="site-std")
    assert some.in_words(0.2) == f"alphas 0.1 to 0.2 at {n - 1} of {n} sites, centre zero, spread site-std"
    (tmp_path / "m.safetensors").write_bytes(b"no")
    with pytest.raises(ArtifactError, match="not a MeanSparse checkpoint"):
        load_checkpoint(tmp_path / "m.safetensors")
