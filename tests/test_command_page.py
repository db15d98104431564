"""The command reference, ``docs/guide/commands.md``, is what the commands say of themselves.

After a change of an option or a command: ``python tests/test_command_page.py --write``.
"""

import re
import sys
from pathlib import Path
from typing import Any

import typer

from meansparse_cli.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "guide" / "commands.md"
WRITE = "python tests/test_command_page.py --write"
GROUP: Any = typer.main.get_command(app)
HEAD = f"""# Every command, every option

<!-- made by: {WRITE} -->

Options can come from a YAML file (`--config`); flags win over the file and the file wins over defaults.
"""


def plain(text: str | None) -> str:
    """Help as text of a Markdown cell: one line, rich's tags gone or made code, what Markdown would read escaped."""
    line = re.sub(r"\[/?b(?:old)?\]", "`", " ".join((text or "").split()))
    line = re.sub(r"\[/?(?:dim|i|italic|cyan|green|yellow|red)\]", "", line).replace("\\[", "[")
    return line.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def row(option: Any) -> str:
    if option.param_type_name == "argument":
        name = option.metavar or option.name.upper()
    else:
        name = ", ".join([*option.opts, *option.secondary_opts])
    shown = f"`{name.replace('|', chr(92) + '|')}`"
    usual = option.default is None or callable(option.default) or option.default in (False, [], ())
    return f"| {shown} | {plain(option.help)} | {'' if usual else f'`{option.default}`'} |"


def page() -> str:
    parts = [HEAD]
    for name, command in GROUP.commands.items():
        options = [row(option) for option in command.params if not option.hidden]
        table = ["| option | | default |", "|---|---|---|", *options]
        parts.append("\n".join([f"## {name}", "", plain(command.help), "", *table, ""]))
    return "\n".join(parts)


def test_page_is_what_the_commands_say() -> None:
    assert PAGE.read_text() == page(), f"{PAGE} differs from the commands: {WRITE}"


def test_every_command_has_a_section_and_a_known_option_its_row() -> None:
    sections = re.findall(r"^## (.*)$", page(), re.MULTILINE)
    assert sections == list(GROUP.commands) and "evaluate" in sections
    evaluate = page().split("## evaluate\n")[1].split("\n## ")[0]
    assert "| `--n-examples`" in evaluate and "| `--attack`" in evaluate


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    PAGE.write_text(page())
