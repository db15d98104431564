"""What the README and the pages of ``docs/`` tell people to type exists, and the tutorial does what it says."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from meansparse_cli.cli import app
from meansparse_cli.settings.commands import COMMANDS as COMMANDS_OF_HELP
from meansparse_cli.settings.commands import Command

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "src" / "meansparse_cli" / "models" / "weights" / "README.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
COMMANDS: dict[str, set[str]] = {
    name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
}


def typed(page: Path) -> list[list[str]]:
    """Every `meansparse ...` of a page's shell blocks, as words; a line that ends in a backslash goes on."""
    blocks = re.findall(r"^ *```(?:console|bash|sh|shell)\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    found = re.findall(r"(?:^ *(?:\$ )?|\$\(|--wrap '|; do )(meansparse [^\n|);']+)", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


@pytest.mark.parametrize("page", [*PAGES, WEIGHTS], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_command_and_option_exists(page: Path) -> None:
    for _, name, *words in typed(page):
        assert name in COMMANDS, name
        unknown = {word.split("=")[0] for word in words if word.startswith("--")} - COMMANDS[name]
        assert not unknown, f"{name} has no {sorted(unknown)}"


@pytest.mark.parametrize("command", COMMANDS_OF_HELP.values(), ids=lambda command: command.name)
def test_the_examples_of_a_help_are_its_own(command: Command) -> None:
    for example in command.examples:
        program, name, *words = shlex.split(example)
        assert (program, name) == ("meansparse", command.name)
        assert {word for word in words if word.startswith("--")} <= COMMANDS[name]


def test_commands_are_found_where_pages_have_them() -> None:
    assert len(typed(ROOT / "README.md")) >= 4 and len(typed(ROOT / "docs" / "tutorial.md")) == 5
    shared = [words for words in typed(ROOT / "docs" / "cluster.md") if words[:2] == ["meansparse", "evaluate"]]
    assert any("--shard" in words for words in shared) and any("--jobs" in words for words in shared)


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path) -> None:
    for words in typed(ROOT / "docs" / "tutorial.md"):
        done = subprocess.run(
            [sys.executable, "-m", "meansparse_cli", *words[1:]], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, (words, done.stderr)
        assert words[1] != "evaluate" or "verdict:" in done.stderr
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_every_make_target_exists() -> None:
    targets = set(re.findall(r"^make ([a-z0-9-]+)\b", TEXT, re.MULTILINE)) | set(
        re.findall(r"`make ([a-z0-9-]+)`", TEXT)
    )
    assert {"demo", "test", "check"} <= targets
    makefiles = "".join((ROOT / name).read_text() for name in ("Makefile", "tables.mk"))
    known = set(re.findall(r"^([a-z0-9-]+):", makefiles, re.MULTILINE))
    assert targets <= known


def test_every_file_that_is_named_exists() -> None:
    """The pages for developers, some of whose files are yet to be written, have a test of their own."""
    named = "\n".join(page.read_text() for page in PAGES if page.parent.name != "development")
    for name in re.findall(r"`((?:src|configs|tests|benchmarks)/[^`*<> ]*)`", named):
        assert (ROOT / name).exists(), name


def test_exit_codes_are_those_of_the_code() -> None:
    from meansparse_cli import errors

    codes = {
        c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.MeanSparseError)
    }
    section = (ROOT / "docs" / "guide" / "run-folder.md").read_text().split("## Exit codes")[1].split("##")[0]
    listed = {int(code) for code in re.findall(r"(\d+) [a-z]", section)}
    assert codes - {1} <= listed
