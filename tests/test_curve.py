"""The curve of a sweep: files that open, hold what they should, and are the same every time."""

import subprocess
import sys
from pathlib import Path

import pytest

from meansparse_cli.accuracy import Accuracy
from meansparse_cli.curve import AlphaPoint, draw_alpha_curve
from meansparse_cli.errors import DataError, StorageError

pytest.importorskip("matplotlib")
POINTS = [AlphaPoint(a / 10, Accuracy(0.7 - a / 50, 0.01, 500), Accuracy(0.3 + a / 100, 0.02, 500)) for a in range(4)]


def draw(folder: Path, points: list[AlphaPoint] = POINTS, chosen: float = 0.2) -> tuple[Path, Path]:
    png, svg = folder / "curve.png", folder / "curve.svg"
    draw_alpha_curve(points, chosen_alpha=chosen, title="tiny: 500 images", png=png, svg=svg)
    return png, svg


def test_both_files_are_written_whole_and_nothing_else(tmp_path: Path) -> None:
    png, svg = draw(tmp_path)
    assert png.read_bytes().startswith(b"\x89PNG")
    assert png.read_bytes().rstrip().endswith(b"IEND\xaeB`\x82")
    assert svg.read_text().rstrip().endswith("</svg>")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curve.png", "curve.svg"]


def test_equal_points_in_any_order_give_equal_bytes(tmp_path: Path) -> None:
    first, second = draw(tmp_path / "a"), draw(tmp_path / "b", POINTS[::-1])
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_the_chosen_alpha_is_marked(tmp_path: Path) -> None:
    assert draw(tmp_path / "a", chosen=0.1)[0].read_bytes() != draw(tmp_path / "b", chosen=0.2)[0].read_bytes()


def test_one_point_is_a_curve_and_none_is_not(tmp_path: Path) -> None:
    draw(tmp_path, POINTS[:1], chosen=0.0)
    with pytest.raises(DataError, match="at least one alpha"):
        draw(tmp_path, [])


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "curve.png").mkdir()
    with pytest.raises(StorageError, match=r"curve\.png"):
        draw(tmp_path)


def test_pyplot_is_not_touched() -> None:
    program = (
        "import sys; from pathlib import Path; from tempfile import mkdtemp\n"
        "from meansparse_cli.accuracy import Accuracy; from meansparse_cli.curve import AlphaPoint, draw_alpha_curve\n"
        "f = Path(mkdtemp()); a = Accuracy(0.5, 0.1, 25)\n"
        "draw_alpha_curve([AlphaPoint(0.0, a, a)], chosen_alpha=0.0, title='t', png=f / 'p', svg=f / 's')\n"
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
