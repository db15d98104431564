"""What the README tells people to type exists."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from meansparse_cli.cli import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "src" / "meansparse_cli" / "models" / "weights" / "README.md"]
COMMANDS: dict[str, set[str]] = {
    name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
}


def typed(page: Path) -> list[list[str]]:
    """Every `meansparse ...` line of a page, as words; a line that ends in a backslash goes on."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?:    )?(?:[a-z]+=\$\()?(meansparse [^\n|)]+)", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.parent.name)
def test_every_command_and_option_exists(page: Path) -> None:
    commands = typed(page)
    assert commands
    for _, name, *words in commands:
        assert name in COMMANDS, name
        unknown = {word for word in words if word.startswith("--")} - COMMANDS[name]
        assert not unknown, f"{name} has no {sorted(unknown)}"


def test_every_make_target_exists() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^make ([a-z0-9-]+)$", text, re.MULTILINE)) | set(
        re.findall(r"`make ([a-z0-9-]+)`", text)
    )
    assert {"demo", "test", "check"} <= targets
    makefiles = "".join((ROOT / name).read_text() for name in ("Makefile", "tables.mk"))
    known = set(re.findall(r"^([a-z0-9-]+):", makefiles, re.MULTILINE))
    assert targets <= known


def test_every_file_that_is_named_exists() -> None:
    for name in re.findall(r"`((?:src|configs|tests|benchmarks)/[^`*<> ]*)`", (ROOT / "README.md").read_text()):
        assert (ROOT / name).exists(), name


def test_exit_codes_are_those_of_the_code() -> None:
    from meansparse_cli import errors

    codes = {
        c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.MeanSparseError)
    }
    section = (ROOT / "README.md").read_text().split("## Exit codes")[1].split("##")[0]
    listed = {int(code) for code in re.findall(r"(\d+) [a-z]", section)}
    assert codes - {1} <= listed
