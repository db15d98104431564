"""Write the golden runs anew: ``python tests/golden/make.py [SCENE]...`` (a minute on one core).

``python tests/golden/make.py pages`` writes anew what ``report`` and ``table`` say of the runs that are there.

Only for a change that is meant to change results, or for another torch: the point of these folders is that they are
what an earlier version left. Say in the commit which files changed, and why. What is written, beside this file:

    machine.json        versions and CPU; comparison is to the byte where they are the same
    done/<scene>        the folder in which all commands of a scene were typed; ``transcript.txt``: what they printed
    half/<name>         a folder as a command leaves it that was stopped with Ctrl-C
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from folders import NOT_KEPT, PLACEHOLDER, SHOWN, seal_again, sha256_of, this_machine, without_figures  # noqa: E402
from scenes import HALF_WAY, SCENES, HalfWay, Scene  # noqa: E402
from terminal import INTERRUPTED, set_out, stopped_after, type_command, type_line, weights_place  # noqa: E402


def make_scene(scene: Scene, target: Path) -> None:
    """Type all of a scene, and keep what it left."""
    with tempfile.TemporaryDirectory() as place:
        set_out(Path(place))
        transcript = "".join(type_line(command) for command in (*scene.commands, *scene.pages))
        Path("transcript.txt").write_text(transcript)
        keep(Path(place), target)


def make_half_way(half: HalfWay, target: Path) -> None:
    """Type a scene up to where it is to be stopped, and keep what is there then."""
    commands = next(scene for scene in SCENES if scene.name == half.scene).commands
    with tempfile.TemporaryDirectory() as place:
        set_out(Path(place))
        for number in half.before:
            type_line(commands[number])
        if half.pattern is not None:
            for file in Path("run").rglob("*"):  # the states of the stages before are not read again
                if file.is_file() and file.suffix not in (".yaml", ".safetensors"):
                    file.unlink()
            with stopped_after(half.pattern, half.count):
                result = type_command(commands[half.begun])
            assert result.exit_code == INTERRUPTED, f"{half.name} was not stopped: {result.output}"
        keep(Path(place), target)


def make_pages(scene: Scene, target: Path) -> None:
    """Type the pages of a scene on the runs that are kept, and keep what is beside them."""
    with tempfile.TemporaryDirectory() as place:
        shutil.copytree(target, place, dirs_exist_ok=True)
        seal_again(Path(place), PLACEHOLDER, str(weights_place()))
        set_out(Path(place))
        for command in scene.pages:
            type_line(command)
        seal_again(Path(place), str(weights_place()), PLACEHOLDER)
        for page in [*Path(place).glob("*.html"), *Path(place).glob("tables/*")]:
            if page.suffix in (".html", ".md", ".yaml"):
                (target / page.relative_to(place)).write_text(without_figures(page.read_text()))


def keep(place: Path, target: Path) -> None:
    """Copy a folder: figures that no report seals as their sha256, and no path of this machine."""
    figures = {file for pattern in ("*.png", "*.svg") for file in place.rglob(pattern)} - set(place.rglob("train.*"))
    shown = set(place.rglob(SHOWN)) if any(place.glob("*.html")) else set()
    digests = {str(file.relative_to(place)): sha256_of(file) for file in sorted(figures)}
    is_half = not (place / "transcript.txt").exists()

    def ignore(folder: str, names: list[str]) -> set[str]:
        left_out = shutil.ignore_patterns(*NOT_KEPT)(folder, names)
        if not is_half:  # what a finished training and a finished sweep went on from, and large
            left_out |= {name for name in names if name in ("train-state.pt", "sweep-alpha")}
        return left_out | {name for name in names if Path(folder) / name in figures - shown}

    shutil.copytree(place, target, ignore=ignore)
    if digests:
        (target / "figures.json").write_text(json.dumps(digests, indent=1) + "\n")
    seal_again(target, str(weights_place()), PLACEHOLDER)
    for page in target.glob("*.html"):
        page.write_text(without_figures(page.read_text()))


def main(*names: str) -> None:
    """All scenes, or those that are named, with what is half-way in them."""
    home = Path.cwd()
    if names == ("pages",):
        for scene in SCENES:
            make_pages(scene, HERE / "done" / scene.name)
        os.chdir(home)
        return
    wanted = names or tuple(scene.name for scene in SCENES)
    jobs = [(make_scene, scene, "done") for scene in SCENES if scene.name in wanted]
    jobs += [(make_half_way, half, "half") for half in HALF_WAY if half.scene in wanted]
    try:
        for make, what, kind in jobs:
            print(kind, what.name, flush=True)
            shutil.rmtree(HERE / kind / what.name, ignore_errors=True)
            make(what, HERE / kind / what.name)
    finally:
        os.chdir(home)
    (HERE / "machine.json").write_text(json.dumps(this_machine(), indent=1) + "\n")


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main(*sys.argv[1:])
