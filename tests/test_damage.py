"""Every file of a run folder damaged in every way, and mended by the very command that the message names."""

import itertools
import json
import os
import random
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from meansparse_cli.cli import app
from meansparse_cli.reporting.console import console

FEW = ["--attack", "pgd-3", "--eps", "0.06", "--n-examples", "6"]
TYPED = {
    "fetch": ["--model", "digits"],
    "calibrate": ["--n-examples", "40"],
    "sweep-alpha": ["--alphas", "0.2", "--n-examples", "12", "--block-size", "6", "--eps", "0.06"],
    "evaluate": [*FEW, "--n-doubt-examples", "1"],
    "measure": ["--alphas", "0.3", *FEW],
}
Damage = Callable[[Path], None]


def _flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data = data or bytearray(1)
    data[len(data) // 2] ^= 1 << 4
    file.write_bytes(data)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "inside").write_text("x")


WAYS: dict[str, Damage] = {
    "empty": lambda file: file.write_bytes(b"") and None,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "bit flip": _flipped,
    "folder": _folder,
    "not UTF-8": lambda file: file.write_bytes(b"\xff\xfe\x80" + file.read_bytes()) and None,
    "other type": lambda file: file.write_text("- 1\n- 2\n") and None,
    "removed": lambda file: file.unlink(),
    "unreadable": lambda file: file.chmod(0),
    "foreign": lambda file: file.write_text('{"schema": "somebody/else/7", "config": {}}') and None,
}


@pytest.fixture(scope="module", autouse=True)
def _few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("meansparse_cli.attacks.apgd.N_STEPS", 10)
        patch.setattr("meansparse_cli.diagnostics.search.N_STEPS", 10)
        patch.setattr("meansparse_cli.diagnostics.search.N_DRAWS", 5)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    for stage, options in TYPED.items():
        assert type_line(stage, "--run", str(folder), *options).exit_code == 0
    return folder


def type_line(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def commands_named(result: Result) -> list[list[str]]:
    """The first command of an error's hint, or what to do before the same command is typed again."""
    text = re.sub("[│╭╮╰╯─]", " ", result.stderr)
    lines = [line.rstrip() for line in text.splitlines()]
    named = [m[0] for line in lines if (m := re.search(r"(?:meansparse [a-z-]+ --|rm -r ).*", line))]
    return [shlex.split(line) for line in named]


def found(run: Path) -> list[Any]:
    """What the reports and the outcomes say, without the clock."""
    reports = []
    for stage in TYPED:
        place = run / "measurements" / "grid" if stage == "measure" else run
        results = yaml.safe_load((place / f"{stage}.yaml").read_text())["results"]
        results.pop("seconds", None)
        reports.append(results)
    files = (run / "outcomes.npz", run / "measurements" / "grid" / "outcomes.npz")
    return reports + [{key: np.load(file)[key].tolist() for key in np.load(file).files} for file in files]


def mend(run: Path) -> list[str]:
    """Type what a user types, and what each error names, until all is said; the commands that errors named."""
    named: list[str] = []
    for line in (*(("report", str(place)) for place in (run, run / "measurements" / "grid")), *_stages(run)):
        for _ in range(6):
            result = type_line(*line)
            if result.exit_code == 0:
                break
            assert isinstance(result.exception, SystemExit), result.exception
            assert (commands := commands_named(result)), f"no command is named: {result.stderr}"
            named.append(shlex.join(commands[0]))
            assert "--fresh" not in commands[0], f"it throws work away: {result.stderr}"
            if commands[0][0] == "rm":
                assert Path(commands[0][-1]).is_relative_to(run)
                shutil.rmtree(commands[0][-1], ignore_errors=True)
                Path(commands[0][-1]).unlink(missing_ok=True)
            else:
                type_line(*commands[0][1:])
        else:
            pytest.fail(f"not mended by {named}: {result.stderr}")
    return named


def _stages(run: Path) -> Iterator[tuple[str, ...]]:
    for stage, options in TYPED.items():
        yield (stage, "--run", str(run), *options)


def scenes(whole: Path) -> list[tuple[str, str, bool]]:
    """(file, way, finished?): with the reports gone, state is what a stage goes on from."""
    files = sorted(str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file())
    ways = [way for way in WAYS if way != "unreadable" or os.geteuid() != 0]
    finished = list(itertools.product(files, ways, [True]))
    is_state = [file for file in files if "state/" in file and "state/reports" not in file]
    return finished + list(itertools.product(is_state, ways, [False]))


def try_scene(whole: Path, run: Path, scene: tuple[str, str, bool]) -> list[str]:
    file, way, is_finished = scene
    shutil.copytree(whole, run)
    if not is_finished:
        for place in (run, run / "measurements" / "grid"):
            shutil.rmtree(place / "state" / "reports")
            for name in ("sweep-alpha.yaml", "meansparse.safetensors", "evaluate.yaml", "measure.yaml", "outcomes.npz"):
                (place / name).unlink(missing_ok=True)
    WAYS[way](run / file)
    named = mend(run)
    assert found(run) == found(whole)
    return named


def test_a_sample_of_damages_is_mended_by_the_commands_that_are_named(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "width", 10_000)
    every = scenes(whole)
    of_reports = [s for s in every if s[0].endswith(("evaluate.yaml", "outcomes.npz", "settings.json")) and s[2]]
    for n, scene in enumerate([*random.Random(23).sample(every, 12), *random.Random(5).sample(of_reports, 6)]):
        try_scene(whole, tmp_path / f"it's {n} $HOME", scene)


@pytest.mark.slow
def test_every_damage_is_mended_by_the_commands_that_are_named(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts of ``docs/reliability.md``."""
    monkeypatch.setattr(console, "width", 10_000)
    lost: dict[str, str] = {}
    counts = {"tried": 0, "without a word": 0, "commands named": 0}
    for n, scene in enumerate(scenes(whole)):
        run = tmp_path / f"it's {n} $HOME"
        counts["tried"] += 1
        try:
            named = try_scene(whole, run, scene)
            counts["without a word"] += not named
            counts["commands named"] += len(named)
        except (AssertionError, pytest.fail.Exception, OSError, ValueError, KeyError) as error:
            lost[str(scene)] = str(error)[:400]
        shutil.rmtree(run)
    counts["lost"] = len(lost)
    print(json.dumps(counts), json.dumps(lost, indent=1))
    assert not lost
