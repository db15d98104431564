"""The curve of a sweep: files that open, hold what they should, and are the same every time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from meansparse_cli.errors import DataError, StorageError
from meansparse_cli.reporting.curves import draw_alpha_curve

pytest.importorskip("matplotlib")


def row(alpha: float, n: int = 500) -> dict[str, Any]:
    def measured(accuracy: float, minus_base: float, n: int) -> dict[str, Any]:
        errors = {"standard_error": 0.02, "minus_base_standard_error": 0.01}
        return {"n_examples": n, "accuracy": accuracy, "minus_base": minus_base, **errors}

    curves = {name: measured(0.3 + alpha / 10, alpha / 10, n) for name in ("plain", "bpda", "worst")}
    return {"alpha": alpha, "clean": measured(0.7 - alpha / 5, -alpha / 5, 500), **curves}


ROWS = [row(a / 10) for a in range(4)]


def results(rows: list[dict[str, Any]], chosen: float) -> dict[str, Any]:
    choice = {"alpha": chosen, "objective": "apgd-ce"}
    critical = dict.fromkeys(("plain", "bpda", "worst"), 2.5)
    return {
        "curve": rows,
        "critical_values": critical,
        "choices": {"paper": choice, "chosen": choice, "worst": {"alpha": 0.0, "objective": "worst"}},
    }


def draw(folder: Path, rows: list[dict[str, Any]] = ROWS, chosen: float = 0.2) -> tuple[Path, Path]:
    png, svg = folder / "curve.png", folder / "curve.svg"
    draw_alpha_curve(results(rows, chosen), title="tiny: 500 images", png=png, svg=svg)
    return png, svg


def test_both_files_are_written_whole_and_nothing_else(tmp_path: Path) -> None:
    png, svg = draw(tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.read_bytes().rstrip().endswith(b"IEND\xaeB`\x82")
    assert svg.read_text().rstrip().endswith("</svg>")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curve.png", "curve.svg"]


def test_equal_points_in_any_order_give_equal_bytes(tmp_path: Path) -> None:
    first, second = draw(tmp_path / "a"), draw(tmp_path / "b", ROWS[::-1])
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_the_chosen_alpha_is_marked(tmp_path: Path) -> None:
    assert draw(tmp_path / "a", chosen=0.1)[0].read_bytes() != draw(tmp_path / "b", chosen=0.2)[0].read_bytes()


def test_one_point_is_a_curve_and_none_is_not(tmp_path: Path) -> None:
    draw(tmp_path, ROWS[:1], chosen=0.0)
    with pytest.raises(DataError, match="at least one alpha"):
        draw(tmp_path, [])


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "curve.png").mkdir()
    with pytest.raises(StorageError, match=r"curve\.png"):
        draw(tmp_path)


def test_an_alpha_that_was_dropped_or_never_attacked_is_drawn_apart(tmp_path: Path) -> None:
    dropped = row(0.3, n=100)
    bare = row(0.2) | {name: {"n_examples": 0} for name in ("plain", "bpda", "worst")}
    whole, partly = draw(tmp_path / "a"), draw(tmp_path / "b", [*ROWS[:2], bare, dropped], chosen=0.1)
    assert whole[1].read_bytes() != partly[1].read_bytes()
    assert "fewer images" in partly[1].read_text()


def test_pyplot_is_not_touched() -> None:
    program = (
        "import json, sys; from pathlib import Path; from tempfile import mkdtemp\n"
        "from meansparse_cli.reporting.curves import draw_alpha_curve\n"
        f"f = Path(mkdtemp()); results = json.loads({json.dumps(json.dumps(results(ROWS, 0.1)))})\n"
        "draw_alpha_curve(results, title='t', png=f / 'p', svg=f / 's')\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
