"""``meansparse compare``: the counts by hand, on golden runs and on outcomes made up."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from meansparse_cli.cli import app
from meansparse_cli.files import sha256_of
from meansparse_cli.runs.report import write_report
from tests.conftest import said

GOLDEN = Path(__file__).parent / "golden" / "done" / "digits" / "run"
NAMES = ("clean", "apgd-ce", "bpda-apgd-ce", "transfer")


def evaluation(folder: Path, outcomes: dict[int, str], *, label: int = 3, images: str = "a", **settings: Any) -> Path:
    """``outcomes``: index -> c wrong at the clean image, p broken by the plain attack, b by BPDA, r robust."""
    folder.mkdir()
    first = {"c": 0, "p": 1, "b": 2, "r": -1}
    broken = np.array([first[outcome] for outcome in outcomes.values()], dtype=np.int16)
    columns = [np.where(broken == k, 1, np.where((broken >= 0) & (broken < k), -1, 0)) for k in range(4)]
    index = np.array(list(outcomes))
    arrays: dict[str, Any] = {"index": index, "label": np.full(len(index), label), "name": np.array(NAMES)}
    for model in ("base", "sparsified"):
        arrays |= {f"{model}_first_broken_by": broken, f"{model}_outcome": np.stack(columns, axis=1).astype(np.int8)}
    np.savez(folder / "outcomes.npz", **arrays)
    write_report(
        folder / "evaluate.yaml",
        stage="evaluate",
        config={"settings": {"eps": "8/255", "norm": "Linf", "split": "test"} | settings},
        results={},
        seconds=0.0,
        inputs={"images": images},
        outputs={"outcomes.npz": sha256_of(folder / "outcomes.npz")},
    )
    return folder


def compare(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["compare", *map(str, arguments)])


def test_counts_by_hand_on_the_examples_that_both_have(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", {7: "r", 2: "r", 9: "c", 4: "p", 5: "b"})
    b = evaluation(tmp_path / "b", {2: "b", 4: "r", 5: "r", 7: "r", 8: "r"})
    result = compare(a, b, "--format", "json")
    assert result.exit_code == 0, result.output
    found = {row["row"]: row for row in json.loads(result.stdout)}
    # shared: 2, 4, 5, 7
    assert {name: (row["gain"]["n"], row["gain"]["gained"], row["gain"]["lost"]) for name, row in found.items()} == {
        "clean": (4, 0, 0),
        "plain attacks": (4, 1, 0),
        "worst case": (4, 2, 1),
    }
    assert (found["worst case"]["first"], found["worst case"]["accuracy"]) == (0.5, 0.75)


def test_the_base_of_a_run_beside_its_sparsified_model_is_the_gain_of_its_report(tmp_path: Path) -> None:
    run = Path(shutil.copytree(GOLDEN, tmp_path / "run"))
    result = compare(f"{run}:base", run, "--format", "json")
    assert result.exit_code == 0, result.output
    row = yaml.safe_load((run / "evaluate.yaml").read_text())["results"]["comparisons"][-1]
    worst = json.loads(result.stdout)[-1]
    assert worst["gain"]["difference"] == pytest.approx(row["sparsified_minus_base"])
    assert (worst["gain"]["gained"], worst["gain"]["lost"]) == (row["gained"], row["lost"])
    page = tmp_path / "page.md"
    assert compare(f"{run}:base", run, "--format", "markdown", "-o", page).stdout.strip() == str(page)
    assert "| **worst case** |" in page.read_text()
    assert "worst case" in compare(f"{run}:base", run, run).stdout


def test_a_page_of_a_comparison_escapes_names_and_says_what_made_it(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", {2: "r", 4: "p", 5: "b"})
    b = evaluation(tmp_path / "b<i>", {2: "r", 4: "r", 5: "r"})
    result = compare(a, b, a, "--format", "html")
    assert result.exit_code == 0, result.output
    page = result.stdout
    assert "<i>" not in page and "b&lt;i&gt;" in page and "<script" not in page and "http" not in page.split("xmlns")[0]
    assert page.count("<circle") == 6 and "+66.67" in page  # three rows for each of the two others
    assert page.count("<dt>") == 3


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"eps": "2/255"}, "eps 8/255 and 2/255"),
        ({"norm": "L2"}, "norm Linf and L2"),
        ({"split": "held-out"}, "split test and held-out"),
        ({"label": 4}, "other labels"),
        ({"images": "b"}, "other images"),
    ],
)
def test_what_cannot_be_paired_is_refused_with_the_reason(other: dict[str, Any], says: str, tmp_path: Path) -> None:
    a, b = evaluation(tmp_path / "a", {1: "r"}), evaluation(tmp_path / "b", {1: "r"}, **other)
    result = compare(a, b)
    assert result.exit_code == 10 and "cannot be paired" in said(result) and says in said(result)


def test_nothing_shared_one_alone_a_run_half_done_or_changed(tmp_path: Path) -> None:
    a, b = evaluation(tmp_path / "a", {1: "r"}), evaluation(tmp_path / "b", {2: "r"})
    assert "no example is in both" in said(compare(a, b))
    assert compare(a).exit_code == 3 and compare(a, b, "--format", "pdf").exit_code == 3
    (tmp_path / "half").mkdir()
    half = compare(a, tmp_path / "half")
    assert half.exit_code == 10 and "meansparse evaluate --run" in said(half)
    shutil.copy(b / "outcomes.npz", a / "outcomes.npz")
    changed = compare(a, b)
    assert changed.exit_code == 10 and "written with" in said(changed)


def test_other_attacks_are_said(tmp_path: Path) -> None:
    a, b = evaluation(tmp_path / "a", {1: "r"}), evaluation(tmp_path / "b", {1: "r"})
    with np.load(b / "outcomes.npz") as file:
        arrays = dict(file) | {"name": np.array(["clean", "pgd-50", "bpda-apgd-ce", "transfer"])}
    np.savez(b / "outcomes.npz", **arrays)
    (b / "evaluate.yaml").unlink()
    write_report(
        b / "evaluate.yaml",
        stage="evaluate",
        config={"settings": {"eps": "8/255", "norm": "Linf", "split": "test"}},
        results={},
        seconds=0.0,
        inputs={"images": "a"},
        outputs={"outcomes.npz": sha256_of(b / "outcomes.npz")},
    )
    result = compare(a, b)
    assert result.exit_code == 0 and "faced pgd-50" in said(result)
