"""What new users stumbled on, each answered in words."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from meansparse_cli.cli import app
from meansparse_cli.data.splits import check_images, load_split
from meansparse_cli.errors import DataError
from meansparse_cli.reporting.evaluation_tables import evaluation_notes
from meansparse_cli.reporting.table import Table
from tests.conftest import said

GOLDEN = Path(__file__).parent / "golden" / "done" / "digits" / "run"


def results(*, alpha: float = 0.3, clean: float = 0.9, rows: tuple[str, ...] = ("clean",)) -> dict[str, Any]:
    accuracy = {"base_accuracy": clean, "base_standard_error": 0.01}
    steps = [{"attack": "apgd-ce"}, {"attack": "bpda-apgd-ce"}]
    return {
        "alpha": alpha,
        "n_examples": 100,
        "comparisons": [{"name": name} | accuracy for name in rows],
        "attacks": {"sparsified": steps},
    }


@pytest.mark.parametrize(
    ("found", "n_classes", "swept", "words"),
    [
        (results(), 10, None, ["--individual"]),
        (results(rows=("clean", "bpda")), 10, 0.3, []),
        (results(rows=("clean", "bpda")), 10, 0.0, ["at alpha 0.3, as asked for; the sweep chose 0"]),
        (
            results(rows=("clean", "bpda"), clean=0.11),
            10,
            None,
            ["11.00 % of the clean images, where guessing is on 10.00"],
        ),
        (results(rows=("clean", "bpda"), clean=0.6), 2, None, []),
        (results(alpha=0.0), 10, 0.0, ["alpha is 0"]),
    ],
)
def test_what_has_to_be_known_before_the_numbers(
    found: dict[str, Any], n_classes: int, swept: float | None, words: list[str]
) -> None:
    notes = evaluation_notes(found, n_classes, swept)
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True))


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("calibrate --model digits --eps 8/255", 2, "it is an option of sweep-alpha, evaluate"),
        ("fetch --model net.py", 4, "--model net.py:FACTORY"),
        ("compare run:bse run", 3, "run:base, or run for"),
        ("compare nowhere run", 10, "nowhere"),
        ("report run -o .", 11, "is a folder"),
        ("calibrate --model digits --dataset digitz --run r", 7, "did you mean --dataset digits?"),
        ("calibrate --model resnet18-w16 --data-dir images.npz --run r", 7, "--dataset images.npz"),
        ("calibrate --model resnet18-w16 --data-dir data --run r", 7, "--data-dir data/cifar10"),
    ],
)
def test_an_error_names_what_mends_it(
    line: str, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images.npz").touch()
    Path("data/cifar10").mkdir(parents=True)
    Path("run").symlink_to(GOLDEN)
    result = CliRunner().invoke(app, line.split(), env={"COLUMNS": "400", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    assert words in said(result)


def test_images_whose_axes_are_in_another_order_are_called_so(tmp_path: Path) -> None:
    images = np.zeros((20, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "nchw.npz", x=images, y=np.arange(20) % 2)
    with pytest.raises(DataError) as refused:
        check_images(load_split(str(tmp_path / "nchw.npz"), None, "calibration"), 2, (3, 8, 8), "nchw.npz")
    assert "transpose" in str(refused.value.hint)


def test_a_short_word_is_in_one_piece_however_narrow_the_terminal() -> None:
    from rich.console import Console

    table = Table.of("", {"alpha": ["0.25"], **{f"column {i}": ["82.81 ± 4.72 of 192"] for i in range(4)}})
    console = Console(width=60, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(table.to_rich())
    assert "0.25" in capture.get() and "alpha" in capture.get() and capture.get().count("82.81") == 4
