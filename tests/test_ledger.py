"""The ledger: results that survive a kill, refuse other settings, and are checked when they are read back."""

import contextlib
from pathlib import Path

import pytest
import torch

from meansparse_cli.errors import ArtifactError
from meansparse_cli.files import load_torch, read_json, save_torch, write_json
from meansparse_cli.ledger import Ledger, StateFile, changes, recorded

KEY = {"seed": 0, "eps": 0.1}


def flip_a_bit(file: Path, at: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(len(data) * at)] ^= 1
    file.write_bytes(data)


def numbers(ledger: Ledger, kind: str = "a/b") -> list[int]:
    return [int(content["n"]) for _, content in ledger.pieces(kind)]


def test_pieces_come_back_in_order_to_whoever_opens_the_folder_again(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, KEY)
    assert [ledger.append("a/b", {"n": torch.tensor(n)}) for n in range(3)] == ["000000", "000001", "000002"]
    assert numbers(Ledger(tmp_path, KEY)) == [0, 1, 2]
    assert numbers(ledger, "a/other") == []


def test_writers_have_names_of_their_own_and_read_each_other(tmp_path: Path) -> None:
    first, second = (Ledger(tmp_path, KEY, writer=f"shard-{i}-of-2") for i in (1, 2))
    assert first.append("a/b", {"n": torch.tensor(1)}) == "shard-1-of-2-000000"
    assert second.append("a/b", {"n": torch.tensor(2)}) == "shard-2-of-2-000000"
    assert numbers(Ledger(tmp_path, KEY)) == numbers(first) == [1, 2]


def test_another_key_is_refused_with_the_difference(tmp_path: Path) -> None:
    Ledger(tmp_path, KEY).append("a/b", {"n": torch.tensor(0)})
    with pytest.raises(ArtifactError, match=r"seed: 0 -> 7") as error:
        Ledger(tmp_path, KEY | {"seed": 7}, mend=lambda theirs: f"mend {theirs}")
    assert error.value.hint == "mend None"


def test_another_key_lives_beside(tmp_path: Path) -> None:
    Ledger(tmp_path, KEY, on_change="beside").put("block", {"n": torch.tensor(0)})
    other = Ledger(tmp_path, KEY | {"seed": 1}, on_change="beside")
    assert other.get("block") is None
    assert Ledger(tmp_path, KEY, on_change="beside").get("block") is not None


def test_parts_may_join_and_must_not_change(tmp_path: Path) -> None:
    Ledger(tmp_path, KEY, parts={"pgd": "1"})
    Ledger(tmp_path, KEY, parts={"square": "1"})
    assert recorded(tmp_path, "attacks") == {"pgd": "1", "square": "1"}
    with pytest.raises(ArtifactError, match="attack pgd: 1 -> 2"):
        Ledger(tmp_path, KEY, parts={"pgd": "2"})


@pytest.mark.parametrize("at", [0.02, 0.3, 0.5, 0.8, 0.98])
def test_a_damaged_piece_is_named_set_aside_and_alone(tmp_path: Path, at: float) -> None:
    ledger = Ledger(tmp_path, KEY)
    for n in range(3):
        ledger.append("a/b", {"n": torch.tensor(n), "image": torch.full((300,), float(n))})
    flip_a_bit(tmp_path / "a/b/000001.pt", at)
    told: list[str] = []
    again = Ledger(tmp_path, KEY, note=told.append)
    found = dict(again.pieces("a/b"))
    assert list(found) in (["000000", "000002"], ["000000", "000001", "000002"])
    if "000001" in found:  # the bit was one that no reader looks at
        assert torch.equal(found["000001"]["image"], torch.full((300,), 1.0)) and int(found["000001"]["n"]) == 1
    else:
        assert len(told) == 1 and "000001.pt" in told[0]
        assert again.append("a/b", {"n": torch.tensor(1)}) == "000003"


def test_a_damaged_image_is_never_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, KEY)
    ledger.put("sums", {"image": torch.arange(5000.0)})
    flip_a_bit(tmp_path / "sums.pt")
    assert ledger.get("sums") is None


def test_a_decision_is_made_once(tmp_path: Path) -> None:
    first = Ledger(tmp_path, KEY).decisions("choice", (1, 2))
    assert first.once("alpha", lambda: [0.1, 0.2]) == [0.1, 0.2]
    again = Ledger(tmp_path, KEY).decisions("choice", (1, 2))
    assert again.once("alpha", lambda: pytest.fail("decided twice")) == [0.1, 0.2]
    assert Ledger(tmp_path, KEY).decisions("choice", (1, 3)).once("alpha", lambda: 5) == 5


def test_a_damaged_decision_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "choice.json"
    write_json(file, {"alpha": 0.25, 1: "a"})
    assert read_json(file) == {"alpha": 0.25, "1": "a"}
    file.write_text(file.read_text().replace("0.25", "0.35"))
    with pytest.raises(ArtifactError, match="damaged"):
        read_json(file)


def test_what_earlier_versions_wrote_has_no_digest_and_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"alpha": 0.25}')
    assert read_json(tmp_path / "old.json") == {"alpha": 0.25}


def test_long_values_are_shown_by_a_hash() -> None:
    (line,) = changes({"weights": "a" * 64}, {"weights": "b" * 64})
    assert line.startswith("weights: aaaaaaaaaaaa... (") and len(line) < 80


def test_a_state_file_goes_on_is_refused_or_is_begun_anew(tmp_path: Path) -> None:
    file, told = tmp_path / "state.pt", list[str]()
    assert StateFile(file, KEY).get() is None
    StateFile(file, KEY | {"of another version": 1}).put({"done": 3})
    assert StateFile(file, KEY).get() == {"done": 3}
    other = KEY | {"seed": 1}
    with pytest.raises(ArtifactError, match=r"state.pt was begun with other settings \(seed: 0 -> 1\)"):
        StateFile(file, other).get()
    assert StateFile(file, other, on_change="restart", note=told.append).get() is None
    assert told == [f"{file} was begun with other settings (seed: 0 -> 1): begun anew"]


def test_a_damaged_state_file_is_named_and_set_aside(tmp_path: Path) -> None:
    file, told = tmp_path / "calibrate.pt", list[str]()
    StateFile(file, KEY).put({"sums": torch.arange(5000.0)})
    flip_a_bit(file)
    assert StateFile(file, KEY, note=told.append).get() is None and not file.exists()
    assert told == [f"{file} is damaged: set aside as calibrate.pt.damaged, and begun anew"]
    assert (tmp_path / "calibrate.pt.damaged").exists()


def test_no_flipped_bit_of_a_state_is_silent(tmp_path: Path) -> None:
    """Every fifth bit, some of each byte: those of the zip's directory too, which no checksum of a zip covers."""
    file = tmp_path / "state.pt"
    save_torch(file, {"broken": torch.tensor([True, False, True]), "name": "apgd-ce", "n": 3})
    whole = file.read_bytes()
    for bit in range(0, 8 * len(whole), 5):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with pytest.raises(ArtifactError, match="is damaged"):
            load_torch(file)
    file.write_bytes(whole)
    assert load_torch(file)["n"] == 3
    assert torch.load(file, weights_only=True)["name"] == "apgd-ce"  # others read it as any file of torch


def test_what_earlier_versions_saved_has_no_seal_and_is_checked_as_a_zip(tmp_path: Path) -> None:
    file = tmp_path / "state.pt"
    torch.save({"sums": torch.arange(500.0)}, file)
    assert load_torch(file)["sums"][499] == 499
    flip_a_bit(file)
    with pytest.raises(ArtifactError, match="is damaged"):
        load_torch(file)


def test_no_flipped_bit_of_a_json_is_silent(tmp_path: Path) -> None:
    file, content = tmp_path / "settings.json", {"seed": 0, "eps": "8/255", "attacks": {"apgd-ce": "v1"}}
    write_json(file, content)
    whole = file.read_bytes()
    n_silent = 0
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with contextlib.suppress(ArtifactError):
            assert read_json(file) == content
            n_silent += 1
    assert n_silent < 8, "white space alone may change"


@pytest.mark.parametrize("way", ["foreign", "list", "folder", "gone", "empty"])
@pytest.mark.parametrize("name", ["settings.json", "settings.json.copy"])
def test_settings_or_their_copy_are_put_back(name: str, way: str, tmp_path: Path) -> None:
    Ledger(tmp_path, KEY, parts={"pgd": "1"}).append("base/pgd", {"n": torch.tensor(1)})
    file, before = tmp_path / name, read_json(tmp_path / "settings.json")
    file.unlink()
    if way == "folder":
        (file / "inside").mkdir(parents=True)
    elif way != "gone":
        file.write_text({"foreign": '{"schema": "somebody/else/7"}', "list": "[1, 2]", "empty": ""}[way])
    assert numbers(Ledger(tmp_path, KEY, parts={"pgd": "1"}), "base/pgd") == [1]
    Ledger(tmp_path, KEY, parts={"pgd": "1"})
    assert read_json(tmp_path / "settings.json") == read_json(tmp_path / "settings.json.copy") == before
