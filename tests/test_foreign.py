"""What others wrote: YAML and JSON that do harm, names that a terminal would obey, errors of the system in words."""

import errno
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from meansparse_cli.cli import app
from meansparse_cli.errors import ArtifactError, ConfigError, StorageError
from meansparse_cli.files import read_json, write_bytes
from meansparse_cli.foreign import read_yaml, visible
from meansparse_cli.reporting.console import console, note
from meansparse_cli.reporting.table import Table, pipes
from tests.conftest import said

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (BOMB.encode(), "aliases stand for more than"),
        (b"a: &a {b: *a}", "alias a contains itself"),
        (b"[" * 150 + b"]" * 150, "nested more than 100 deep"),
        (b"[" * 100_000, "nest"),  # libyaml has a limit of its own since 0.2.6
        (b"seed: 1\nmodel: digits\nseed: 2\n", "key 'seed' stands twice"),
        (b"a: {b: 1, c: {}, b: 2}", "key 'b' stands twice"),
        ("modèle: 1".encode("latin-1"), "not UTF-8 (byte 3)"),
        (b"a: \0", "characters are not allowed"),
        (b"a: !!python/name:os.system", "could not determine a constructor"),
        (b"a: " + b"9" * 5000, "Exceeds the limit"),
        (b"a: 1\n---\nb: 2\n", "another document in line 2"),
        (b"#" * (2**24 + 1), "more than 16 MiB"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_yaml_that_does_harm_is_refused_in_a_sentence(content: bytes, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as refused:
        read_yaml(file, ConfigError, hint="")
    assert reason in refused.value.message and "\n" not in refused.value.message


def test_yaml_means_what_it_says(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    text = (
        "sites: 7:12\nname: 2026-11-28\nbase: &b {seed: 1, eps: 8/255}\nmine: {<<: *b, seed: 2}\nx: -1.5e+3\nn: 0x10\n"
    )
    expected = {
        "sites": "7:12",
        "name": "2026-11-28",
        "base": {"seed": 1, "eps": "8/255"},
        "mine": {"seed": 2, "eps": "8/255"},
        "x": -1500.0,
        "n": 16,
    }
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        file.write_bytes(text.encode(encoding))
        assert read_yaml(file, ConfigError, hint="") == expected


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop"])
def test_yaml_that_is_no_file(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "loop": lambda: file.symlink_to(file)}[kind]()
    with pytest.raises(ConfigError, match="is not YAML|symbolic links"):
        read_yaml(file, ConfigError, hint="")


def test_json_that_is_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text("[" * 100_000)
    with pytest.raises(ArtifactError, match="nested too deeply"):
        read_json(tmp_path / "s.json")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ELOOP, "links lead in a circle"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.EISDIR, "what is in its place"),
        (errno.EPERM, "who may write there"),
        (errno.EROFS, "who may write there"),
        (errno.EDQUOT, "free some space"),
        (errno.ESTALE, "still there"),
        (errno.EIO, "whether the disk or the network is well"),
        (errno.EMFILE, "free some space"),
    ],
)
def test_every_error_of_the_system_has_words(
    number: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), "place")

    monkeypatch.setattr("os.replace", fails)
    with pytest.raises(StorageError, match=expected):
        write_bytes(tmp_path / "x", b"")
    monkeypatch.setattr("meansparse_cli.stages.models.select_models", fails)
    result = CliRunner().invoke(app, ["models"])
    assert result.exit_code == StorageError.exit_code
    assert f"{os.strerror(number)}: place" in said(result) and expected in said(result)


@pytest.mark.parametrize(
    ("error", "code"),
    [(MemoryError(), 12), (RuntimeError("x: can't allocate memory: y"), 12), (RecursionError("r"), 1)],
)
def test_what_nobody_foresaw_has_no_traceback(error: Exception, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("meansparse_cli.stages.models.select_models", fails)
    result = CliRunner().invoke(app, ["models"])
    assert (result.exit_code, "Traceback" in result.output) == (code, False)
    assert CliRunner().invoke(app, ["--debug", "models"]).exception is error


def test_a_deleted_folder_and_a_loop_of_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for run in (str(tmp_path / "loop"), "x" * 300):
        result = CliRunner().invoke(app, ["fetch", "--model", "digits", "--run", run])
        assert result.exit_code in (3, 11) and "Traceback" not in result.output, result.output
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    result = CliRunner().invoke(app, ["fetch", "--model", "digits"])
    assert result.exit_code == 11 and "type the same command in another one" in said(result)


def test_no_name_reaches_a_terminal_or_a_page_as_it_is() -> None:
    name = "a\x1b]0;t\x07[/red]\n\x9b2J\u202eb\udc80"
    table = Table(name, (name, "n"), [(name, "1")], frozenset({0}))
    with console.capture() as captured:
        note(name)
        console.print(table.to_rich())
    shown = captured.get()
    assert not any(c in shown for c in "\x1b\x07\x9b\u202e\udc80")
    assert "\\x1b]0;t[/red]" in shown
    assert pipes([name]) == "| a\\x1b]0;t\\x07[/red]\\n\\x9b2J\\u202eb\\udc80 |"
    assert visible("é 中 \u00a0±") == "é 中 \u00a0±"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "--eps", "1e99999999"], "--eps: eps is '1e99999999'; expected a number"),
        (["train", "--eps", "1e400"], "expected a number"),
        (["train", "--width", "100000"], "--width: Input should be less than or equal to 1024"),
        (["train", "--lr", "1e400"], "--lr: Input should be a finite number"),
        (["train", "--seed", "-1"], "--seed: Input should be greater than or equal to 0"),
        (["evaluate", "--seed", "99999999999999999999"], "--seed: Input should be less than"),
        (["evaluate", "--batch-size", "9" * 30], "expected auto, or a number of images from 1 on"),
        (["evaluate", "--n-examples", "0"], "--n-examples: Input should be greater than or equal to 1"),
        (["evaluate", "--alpha", "nan"], "--alpha: alpha is nan; it must be 0 or above"),
        (["evaluate", "--workers", "100000"], "--workers: Input should be less than or equal to 1024"),
        (["sweep-alpha", "--alphas", "0:1e99999999:1"], "expected FROM:TO:STEP"),
        (["sweep-alpha", "--max-clean-drop", "nan"], "--max-clean-drop: Input should be"),
        (["evaluate", "--eps", "1/255:1e999:1"], "expected FROM:TO:STEP"),
    ],
)
def test_extreme_numbers(words: list[str], expected: str) -> None:
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 3 and expected in said(result), result.output
