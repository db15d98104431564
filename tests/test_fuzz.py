"""Hostile input, made by chance from a seed: each ends in seconds, in one message, with an exit code of the README.

300 YAML files, 300 command lines, 300 files of weights, images, reports and pictures. Another seed:
``MEANSPARSE_FUZZ_SEED=7 pytest -m slow tests/test_fuzz.py``. A case that fails is named by kind, seed and number.
"""

import inspect
import io
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from meansparse_cli.cli import app
from meansparse_cli.cli.commands import FUNCTIONS
from meansparse_cli.cli.options import typer_function
from meansparse_cli.runs.report import _content_hash
from meansparse_cli.settings.commands import COMMANDS, SECTIONS
from tests.conftest import said

pytestmark = [
    pytest.mark.slow,
    # numpy leaves a broken file open
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning", "ignore::UserWarning"
    ),
]

SEED = int(os.environ.get("MEANSPARSE_FUZZ_SEED", "23"))
N, CHUNK = 300, 30
CHUNKS = range(N // CHUNK)
SECONDS = 10
DOCUMENTED = {0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 75}
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
NETWORK = """import torch
def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(),
                               torch.nn.Linear(256, 10))
"""
NUMBERS = ["0", "-1", "1", "2", "1e400", "-1e400", "1e99999999", "1e-99999999", "nan", "inf", "-inf", "", " ", "0x10"]
NUMBERS += ["99999999999999999999", "9" * 5000, "8/255", "8 / 255", "8/0", "-8/255", "1/3/5", "8÷255", "٣", "1_000"]
NUMBERS += ["0.1,0.2,,x", "0:1:0", "1:0:1", "0:1:1e-9", "0:1e99999999:1", "0:nan:1", ":::", ",,,", "1/255:9/255:1/255"]
TEXTS = [
    "[/]",
    "[red]",
    "[bold",
    "a\x1b[31mb",
    "\x1b]0;title\x07",
    "\x9b2J",
    "\u202etxt",
    "a\nb",
    "a\tb",
    "\x7f",
    "é" * 200,
]
TEXTS += [
    "x" * 300,
    "../..",
    "/",
    "/dev/null/x",
    "/proc/self/mem",
    "loop/x",
    "~",
    "*",
    "{}",
    "a|b",
    "`x`",
    "<b>",
    "\udc80",
]
TEXTS += [
    "first:99999999999",
    "single:-1",
    "9-3",
    "7:12",
    "1/0",
    "3/2",
    "module:",
    ":f",
    "net.py:",
    "net.py:nothing",
    "all,",
]
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{n}: &{n} [{','.join(['*' + p] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True)
)
YAMLS = [
    BOMB,
    "a: &a [*a]\n",
    "&a {x: *a}",
    "[" * 20000,
    "{a: " * 5000,
    "- " * 30000,
    "? " * 5000,
    "seed: 1\nseed: 2\n",
]
YAMLS += [
    "!!python/object/apply:os.system [echo]",
    "seed: !!binary x",
    "seed: !!int x",
    "seed: 2026-11-28",
    "\0",
    "\x1b[31m",
]
YAMLS += [
    "%YAML 9.9\n---\na: 1",
    "a: 1\n---\nb: 2",
    "--- |\n text",
    "*x",
    "? [a]\n: b",
    "? {a: b}\n: c",
    "{}: 1",
    "1: 2",
    "null: 1",
]
YAMLS += [
    "<<: 1",
    "<<: [1]",
    "<<: &a {<<: *a}",
    "seed: " + "9" * 5000,
    "\t- a",
    "x" * 70000,
    "'",
    '"\\uD800"',
    "seed: .nan",
    "",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where it happens: a run of ``digits``, calibrated and with a small evaluation; a network; a loop of links."""
    here, before = tmp_path_factory.mktemp("fuzz"), Path.cwd()
    os.chdir(here)
    Path("net.py").write_text(NETWORK)
    Path("loop").symlink_to("loop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEANSPARSE_CACHE", str(here / "cache"))
        for line in (
            "calibrate --model digits --run r --n-examples 20",
            "evaluate --run r --alpha 0.2 --attack apgd-ce --n-examples 2 --no-doubts --save-witnesses",
        ):
            assert CliRunner().invoke(app, line.split()).exit_code == 0
        yield here
    os.chdir(before)


class TooLong(BaseException):
    """More than the seconds that a refusal may take."""


@contextmanager
def _in_time() -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        raise TooLong(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def holds(words: list[str], what: str) -> int:
    """The exit code of a command that ends as it should."""
    began = time.monotonic()
    with _in_time():
        result = CliRunner().invoke(app, words, env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    what = f"{what}: {words!r} {time.monotonic() - began:.1f} s\n{result.output[:3000]}"
    assert result.exit_code in DOCUMENTED, what
    assert result.exception is None or isinstance(result.exception, SystemExit), f"{what}\n{result.exception!r}"
    assert "Traceback" not in result.output, what
    assert not CONTROL.search(result.output.replace("\r", "")), what
    if result.exit_code not in (0, 2):
        assert 10 < len(said(result)) < 3000, what
    return result.exit_code


def _run(kind: str, chunk: int, one: Callable[[random.Random], list[str]]) -> None:
    """``CHUNK`` cases; all that fail are shown together."""
    failed = []
    for number in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        dice = random.Random(f"{kind}-{SEED}-{number}")
        words = one(dice)
        try:
            holds(words, f"{kind} seed {SEED} number {number}")
        except (AssertionError, TooLong) as error:
            failed.append(f"{type(error).__name__} {error}")
    assert not failed, "\n\n".join(failed)


def mutated(dice: random.Random, data: bytes) -> bytes:
    """Some bytes changed, cut out, doubled or put in."""
    content = bytearray(data)
    for _ in range(dice.choice([1, 1, 2, 8, 64])):
        at = dice.randrange(len(content) + 1)
        what = dice.randrange(6)
        if what == 0:
            del content[at:]
        elif what == 1:
            del content[at : at + dice.randrange(1, 64)]
        elif what == 2:
            content[at:at] = content[at : at + dice.randrange(1, 512)]
        elif what == 3:
            content[at:at] = dice.choice(
                [b"\0", b"\xff", b"\x1b[31m", b"\n", b"[", b"}", b"99999999999999999999", b"nan"]
            )
        else:
            for i in range(at, min(at + dice.choice([1, 1, 4]), len(content))):
                content[i] = dice.randrange(256)
    return bytes(content)


def _any_value(dice: random.Random, depth: int = 0) -> object:
    """A value of any type that YAML knows."""
    if depth < 3 and dice.random() < 0.3:
        inner = [_any_value(dice, depth + 1) for _ in range(dice.randrange(4))]
        return inner if dice.random() < 0.5 else {str(i): one for i, one in enumerate(inner)}
    pool: list[object] = [None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), b"x", *NUMBERS, *TEXTS]
    return dice.choice(pool)


def _changed(dice: random.Random, value: object) -> object:
    """A tree of values with one of them replaced by another, or left out."""
    if isinstance(value, dict) and value and dice.random() < 0.95:
        key = dice.choice(list(value))
        if dice.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: _changed(dice, value[key])}
    if isinstance(value, list) and value and dice.random() < 0.8:
        at = dice.randrange(len(value))
        return [*value[:at], _changed(dice, value[at]), *value[at + 1 :]]
    return _any_value(dice)


def _a_config(dice: random.Random) -> bytes:
    if dice.random() < 0.35:
        text = dice.choice(YAMLS)
    else:
        fields = [
            name for cls in SECTIONS.values() for name in cls.model_fields if name not in ("model", "run", "config")
        ]
        values: dict[str, object] = {dice.choice(fields): _any_value(dice) for _ in range(dice.randrange(1, 5))}
        for section in dice.sample(sorted(SECTIONS), 2):
            own = [name for name in SECTIONS[section].model_fields if name not in ("model", "run")]
            values[section] = {dice.choice(own): _any_value(dice)} if dice.random() < 0.8 else _any_value(dice)
        text = yaml.safe_dump(values, allow_unicode=dice.random() < 0.5)
    data = text.encode(dice.choice(["utf-8"] * 5 + ["utf-16", "utf-8-sig", "utf-16-le", "utf-32"]), "surrogatepass")
    return mutated(dice, data) if dice.random() < 0.3 else data


@pytest.mark.parametrize("chunk", CHUNKS)
def test_yaml(chunk: int, folder: Path) -> None:
    """Config files of seven commands, and reports: damaged, or of nonsense with a hash that fits."""
    original = Path("r/evaluate.yaml").read_bytes()

    def one(dice: random.Random) -> list[str]:
        if dice.random() < 0.3:
            content = _changed(dice, yaml.safe_load(original))
            if isinstance(content, dict):
                content["content_sha256"] = _content_hash(content)
            data = yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass")
            place = Path("forged") / "evaluate.yaml"
            place.parent.mkdir(exist_ok=True)
            place.write_bytes(dice.choice([data, data, _a_config(dice)]))
            return ["report", "forged", "--format", dice.choice(["table", "markdown", "html", "json"])]
        Path("c.yaml").write_bytes(_a_config(dice))
        command = dice.choice(["sites", "sites", "fetch", "train", "evaluate", "sweep-alpha", "measure"])
        given = {"sites": ["--model", "digits"], "fetch": ["--model", "digits", "--run", "q"]}
        nowhere = ["--dataset", "nowhere.npz"] if command == "train" else ["--run", "nowhere"]
        return [command, *given.get(command, nowhere), "--config", "c.yaml"]

    _run("yaml", chunk, one)


def _options(command: str) -> dict[str, tuple[str, bool]]:
    """Name -> its spelling and whether it is a switch; an argument is spelled ''."""
    found = {}
    for name, parameter in inspect.signature(typer_function(COMMANDS[command], FUNCTIONS[command])).parameters.items():
        kind, option = get_args(parameter.annotation)
        spellings = getattr(option, "param_decls", None) or ("",)
        found[name] = (spellings[0].split("/")[0], kind is bool or bool in get_args(kind))
    return found


@pytest.mark.parametrize("chunk", CHUNKS)
def test_command_lines(chunk: int, folder: Path) -> None:
    """Any options of any command with any values; what would compute for long gets a model or data that are nowhere."""

    def one(dice: random.Random) -> list[str]:
        command = dice.choice(sorted(COMMANDS))
        options, words = _options(command), [command]
        for name in dice.sample(sorted(options), min(len(options), dice.randrange(1, 5))):
            spelling, is_switch = options[name]
            if name in ("check", "debug", "device"):
                continue
            value = dice.choice([*NUMBERS, *TEXTS, *(["loop", "r", "net.py", "digits"] * 4)])
            words += [spelling] if is_switch else [word for word in (spelling, value) if word]
        if command == "reproduce":
            words.append("--dry-run")
        elif command == "train":
            words += ["--dataset", "nowhere.npz"]
        elif command in ("run", "sweep-alpha", "evaluate", "measure"):
            words += ["--model", dice.choice(TEXTS) + "-nothing"]
        elif command in ("calibrate", "verify", "plot"):
            words += ["--n-examples", dice.choice(["0", "3", "99999999"])]
        return words

    _run("command", chunk, one)


def _picture(dice: random.Random, format: str) -> bytes:
    held = io.BytesIO()
    mode = dice.choice(["L", "RGB", "P", "1"]) if format == "png" else dice.choice(["L", "RGB"])
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8), np.uint8)).convert(mode).save(held, format)
    return held.getvalue()


def _weights(dice: random.Random) -> list[str]:
    state: dict[str, object] = {"1.x": torch.zeros(2)}
    spoiled = dice.choice(
        [None, {"a": state}, [state], torch.zeros(3), {"w": torch.zeros(2).to_sparse()}, {1: {2: 3}}, "x"]
    )
    namespace: dict[str, object] = {}
    exec(NETWORK, namespace)
    network = namespace["make"]()  # type: ignore[operator]
    data = network.state_dict() if spoiled is None or dice.random() < 0.5 else spoiled
    held = io.BytesIO()
    torch.save(data, held, _use_new_zipfile_serialization=dice.random() < 0.6)
    name = dice.choice(["w.pt", "w.pth", "w.safetensors", "w.bin", "w\x1b[31m.pt"])
    Path(name).write_bytes(mutated(dice, held.getvalue()))
    return ["fetch", "--model", "net.py:make", "--weights", name, "--run", f"w{dice.randrange(10**9)}"]


def _own_file(dice: random.Random) -> list[str]:
    """A file of weights of this program, one that it exported, or statistics."""
    source = dice.choice([Path("r/statistics.safetensors"), Path("digits.safetensors")])
    if not source.exists():
        from meansparse_cli.models.trained import __file__ as module

        source.write_bytes((Path(module).parent / "weights" / "digits.safetensors").read_bytes())
    data = source.read_bytes()
    head = 8 + int.from_bytes(data[:8], "little")
    target = Path(f"m{dice.randrange(10**9)}.safetensors")
    target.write_bytes(mutated(dice, data[:head]) + data[head:] if dice.random() < 0.6 else mutated(dice, data))
    if dice.random() < 0.5:
        return ["fetch", "--model", str(target), "--run", target.stem]
    return ["verify", str(target), "--run", "r"]


def _images(dice: random.Random) -> list[str]:
    shape = dice.choice([(6, 8, 8, 1), (6, 8, 8), (6,), (), (0, 8, 8, 1), (6, 8, 8, 1, 1)])
    kind = dice.choice([np.uint8, np.float32, np.complex64, np.int64, "U3"])
    held = io.BytesIO()
    np.savez(held, x=np.zeros(shape, kind), y=np.arange(6).astype(dice.choice([np.int64, np.float32, np.uint64])))
    data = held.getvalue()
    name = dice.choice(["i.npz", "i.zip", "i.npy", "i.pt", "i\x1b[2J.npz"])
    Path(name).write_bytes(mutated(dice, data) if dice.random() < 0.7 else data)
    if dice.random() < 0.4:
        return ["verify", name, "--run", "r", "--n-examples", "4"]
    run = f"i{dice.randrange(10**9)}"
    return ["calibrate", "--model", "net.py:make", "--dataset", name, "--n-examples", "4", "--run", run]


def _pictures(dice: random.Random) -> list[str]:
    place, run = Path(f"p{dice.randrange(10**9)}"), f"k{dice.randrange(10**9)}"
    for name in ["a", "b\x1b[31m", *dice.sample(["[red]", "é", "\udc80", "c d", ".hidden"], 2)]:
        (place / name).mkdir(parents=True)
        for i in range(3):
            format = dice.choice(["png", "jpeg", "bmp", "webp"])
            data = _picture(dice, format)
            file = place / name / f"{i}{dice.choice(['', '[red]', chr(27)])}.{format}"
            file.write_bytes(mutated(dice, data) if dice.random() < 0.2 else data)
    if dice.random() < 0.3:
        with zipfile.ZipFile(f"{place}.zip", "w") as archive:
            for file in sorted(place.rglob("*.*")):
                with_name = str(file.relative_to(place)).encode("utf-8", "replace").decode()
                archive.writestr(with_name, file.read_bytes() if file.is_file() else b"")
        place = Path(f"{place}.zip")
        place.write_bytes(mutated(dice, place.read_bytes()))
    return ["calibrate", "--model", "net.py:make", "--dataset", str(place), "--n-examples", "4", "--run", run]


def _run_file(dice: random.Random) -> list[str]:
    """Any file of a run folder, changed, in a copy of it."""
    import shutil

    copy = Path(f"f{dice.randrange(10**9)}")
    shutil.copytree("r", copy)
    target = dice.choice(sorted(one for one in copy.rglob("*") if one.is_file() and one.name != ".lock"))
    target.write_bytes(mutated(dice, target.read_bytes()))
    again = "evaluate --alpha 0.2 --attack apgd-ce --n-examples 2 --no-doubts --save-witnesses"
    command = dice.choice(
        [["report", str(copy)], *[[*line.split(), "--run", str(copy)] for line in ("sites", again, "export")]]
    )
    return ["export", str(copy)] if command[0] == "export" else command


@pytest.mark.parametrize("chunk", CHUNKS)
def test_files(chunk: int, folder: Path) -> None:
    """Weights, arrays, pictures, zips, safetensors and the files of a run, with bytes changed."""
    _run("file", chunk, lambda dice: dice.choice([_weights, _own_file, _images, _pictures, _run_file])(dice))


@pytest.mark.parametrize(
    "words",
    [
        ["sites", "--model", "digits", "--config", "bomb.yaml"],
        ["sites", "--model", "net\x1b[31m.py:make"],
        ["train", "--eps", "1e99999999", "--dataset", "nowhere.npz"],
        ["fetch", "--model", "digits", "--run", "loop"],
        ["fetch", "--model", "digits", "--run", "x" * 300],
        ["report", "\udc80"],
    ],
)
def test_real_processes(words: list[str], folder: Path) -> None:
    """What Typer's runner does not see: the interpreter's own traceback, and the bytes that are written."""
    Path("bomb.yaml").write_text(BOMB)
    command = [sys.executable, "-m", "meansparse_cli", *words]
    done = subprocess.run(command, capture_output=True, timeout=60, env=os.environ | {"NO_COLOR": "1"})
    text = (done.stdout + done.stderr).decode()
    assert done.returncode in DOCUMENTED - {0}, text
    assert "Traceback" not in text and not CONTROL.search(text)
