"""Golden runs: what today's commands leave, byte by byte, and folders of an earlier version that are typed again.

Through the command line alone, so that this says the same whatever the modules inside are called. ``golden/make.py``
wrote the folders and says how to write them anew; ``golden/scenes.py`` is what is typed.
"""

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
try:
    from folders import (  # type: ignore[import-not-found]
        NOT_KEPT,
        PLACEHOLDER,
        differences,
        seal_again,
        sha256_of,
        this_machine,
        without_figures,
    )
    from scenes import HALF_WAY, SCENES, HalfWay  # type: ignore[import-not-found]
    from terminal import counted, set_out, type_line, weights_place  # type: ignore[import-not-found]
finally:
    sys.path.remove(str(GOLDEN))

EXACTLY = json.loads((GOLDEN / "machine.json").read_text()) == this_machine()
OF_SCENE = {scene.name: scene for scene in SCENES}


OLDER_SUMS = ("calibrate", "search", "digits-sweep")
"""Left half way with sums of an older version, in another order: they end with these statistics, not with ours."""


@dataclass
class Typed:
    """A scene typed anew: its folder, what each command printed and how many images it sent through convolutions."""

    folder: Path
    lines: list[str]
    work: list[int]


@pytest.fixture(autouse=True)
def _back_home() -> Iterator[None]:
    home = Path.cwd()
    yield
    os.chdir(home)


def in_place(golden: Path, folder: Path) -> Path:
    """A copy of a golden folder, with the embedded weights where they are here, and the current folder."""
    shutil.copytree(golden, folder, dirs_exist_ok=True)
    seal_again(folder, PLACEHOLDER, str(weights_place()))
    set_out(folder)
    return folder


def files_of(folder: Path) -> dict[str, Path]:
    """What a run is judged by, by relative path: all but states, locks, figures and what the scene was given."""

    def counts(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        return path.is_file() and "state" not in parts and not any(fnmatch(parts[-1], pattern) for pattern in IGNORED)

    return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if counts(path)}


IGNORED = (*NOT_KEPT, "*.png", "*.svg", "figures.json", "transcript.txt", "train-state.pt", "*.pyc")


def assert_equal(golden: dict[str, Path], new: dict[str, Path], *, exactly: bool = EXACTLY) -> None:
    """Every file of ``golden`` is in ``new``, and no other, and they differ in no more than they may."""
    assert sorted(golden) == sorted(new)
    found = {name: differences(golden[name], new[name], exactly=exactly) for name in golden}
    assert not any(found.values()), {name: lines[:10] for name, lines in found.items() if lines}


def assert_same_figures(golden: Path, new: Path) -> None:
    """Figures that are there under both names are the same, to the byte on the same machine."""
    digests: dict[str, str] = json.loads((golden / "figures.json").read_text())
    for name, digest in digests.items():
        assert not EXACTLY or sha256_of(new / name) == digest, name


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Typed]]:
    """Types a scene anew, in a folder of its own, once."""
    home = Path.cwd()

    @functools.cache
    def type_scene(name: str) -> Typed:
        scene, folder, lines, work = OF_SCENE[name], tmp_path_factory.mktemp(name), [], []
        set_out(folder)
        try:
            for command in (*scene.commands, *scene.pages):
                with counted() as n:
                    lines.append(type_line(command))
                work.append(n[0])
        finally:
            os.chdir(home)
        return Typed(folder, lines, work)

    yield type_scene


@pytest.mark.parametrize("name", OF_SCENE)
def test_typed_anew_it_ends_as_it_did(name: str, typed: Callable[[str], Typed]) -> None:
    new, golden = typed(name), GOLDEN / "done" / name
    assert_equal(files_of(golden), files_of(new.folder))
    if (golden / "figures.json").exists():
        assert_same_figures(golden, new.folder)
    (new.folder / "transcript.txt").write_text("".join(new.lines))
    assert not differences(golden / "transcript.txt", new.folder / "transcript.txt", exactly=EXACTLY)


@pytest.mark.parametrize("name", OF_SCENE)
def test_a_finished_folder_of_an_earlier_version_is_done(name: str, tmp_path: Path) -> None:
    folder, scene = in_place(GOLDEN / "done" / name, tmp_path), OF_SCENE[name]
    transcript = (folder / "transcript.txt").read_text()
    stages = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file()}
    said, work = "", 0
    for command in (*scene.commands, *scene.pages):
        with counted() as n:
            said += type_line(command)
        if command.split()[0] not in ("export", "verify", "report", "table"):
            work += n[0]
    assert said == transcript
    assert work == 0, "a network was run, and nothing was to be done"
    written = {path.name for path, time in stages.items() if not path.exists() or path.stat().st_mtime_ns != time}
    assert {name for name in written if not name.startswith("verify-")} <= {".lock"}


def test_pages_of_a_finished_folder_are_the_ones_that_were_written(tmp_path: Path) -> None:
    golden = in_place(GOLDEN / "done" / "digits", tmp_path / "golden")
    folder = in_place(GOLDEN / "done" / "digits", tmp_path / "now")
    pages = [path.relative_to(folder) for path in folder.rglob("*") if "run" not in path.relative_to(folder).parts]
    pages = [page for page in pages if page.suffix in (".html", ".md") or page.name in ("report.json", "table1.yaml")]
    assert len(pages) == 5
    for page in pages:
        (folder / page).unlink()
    for command in OF_SCENE["digits"].pages:
        type_line(command)
    for page in pages:
        assert without_figures((folder / page).read_text()) == (golden / page).read_text(), page


@pytest.mark.parametrize("half", HALF_WAY, ids=lambda half: half.name)
def test_a_folder_left_half_way_goes_on_and_ends_the_same(
    half: HalfWay, typed: Callable[[str], Typed], tmp_path: Path
) -> None:
    whole, commands = typed(half.scene), OF_SCENE[half.scene].commands
    folder = in_place(GOLDEN / "half" / half.name, tmp_path)  # last: it leaves us in the folder
    before = {name: path.read_bytes() for name, path in files_of(folder).items()}
    with counted() as n:
        said = [type_line(commands[number]) for number in half.again]
    assert said == [whole.lines[number] for number in half.again]
    left, golden = files_of(folder), files_of(GOLDEN / "done" / half.scene)
    assert len(left) > len(before) and left.keys() <= golden.keys()
    # a report of a stage that was done keeps the words of the version that wrote it
    anew = {name: path for name, path in left.items() if before.get(name) != path.read_bytes()}
    assert_equal({name: golden[name] for name in anew}, anew, exactly=EXACTLY and half.name not in OLDER_SUMS)
    if half.pattern is not None:
        assert n[0] < 0.95 * whole.work[half.begun], "it began anew"
