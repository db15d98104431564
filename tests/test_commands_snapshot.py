"""The command line as it was recorded in ``golden/commands.json``: every option with its spellings, help and default,
and what wrong calls answer. A change that is meant is recorded anew with
``python tests/test_commands_snapshot.py --write``.
"""

import contextlib
import inspect
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from meansparse_cli.cli import app

RECORDED = Path(__file__).parent / "golden" / "commands.json"
RECORD = "python tests/test_commands_snapshot.py --write"
ENVIRONMENT = {"COLUMNS": "200", "NO_COLOR": "1"}

FILES = {
    "unknown-key.yaml": "batchsize: 3\n",
    "unknown-section.yaml": "sweep-alfa: {}\n",
    "bad-value.yaml": "seed: many\n",
    "not-yaml.yaml": "a: [1\n",
    "a-file": "",
}
WRONG_MODELS = ("Bartoldson2025", "Wang2023Better", "timm:nowhere", "torchvision:nowhere")
WRONG_VALUES = {
    "--config": ("nowhere.yaml", *(name for name in FILES if name.endswith(".yaml"))),
    "--model": WRONG_MODELS,
    "--run": ("a-file", "a-file/below"),
}
"""Given alone. Every other option is tried with one value that no option takes, on the digits model."""
NO_VALUE = "no-such-value"
TAKES_ANY_TEXT = {"--run", "--data-dir", "--from-file", "--weights", "--name", "--data-note", "--output", "--pool"}
ASKED_LATE = {"--alphas", "--objective", "--alpha-rule", "--centre", "--spread", "--attack", "--precision"}
"""What ``run`` looks at only when the stages before are done."""
WRONG_CALLS = {
    "fetch": [[], ["--from-file", "nowhere.pt"], ["--model", "digits", "--weights", "nowhere.pt"]],
    "calibrate": [
        ["--model", "digits", "--fraction", "2"],
        ["--model", "digits", "--n-examples", "0"],
        ["--model", "digits", "--n-examples", "5000"],
        ["--model", "digits", "--sites", "first:"],
        ["--model", "resnet18-w16"],
        ["--run", "nowhere"],
    ],
    "sweep-alpha": [
        ["--model", "digits"],
        ["--model", "digits", "--alphas", "-0.1"],
        ["--model", "digits", "--alphas", "0.1:0.5"],
        ["--model", "digits", "--eps", "0"],
        ["--run", "nowhere"],
    ],
    "evaluate": [
        ["--model", "digits"],
        ["--model", "digits", "--eps", "0"],
        ["--model", "digits", "--shard", "9/8"],
        ["--model", "digits", "--shard", "0/8"],
        ["--model", "digits", "--name", "a/b"],
        ["--run", "nowhere"],
    ],
    "measure": [["--model", "digits"], ["--model", "digits", "--eps", "0"], ["--run", "nowhere"]],
    "run": [["--config", "nowhere.yaml", "--model", "digits"]],
    "table": [[], ["2"], ["2", "nowhere"], ["13", "nowhere"]],
    "reproduce": [["13"], ["12", "--only", "nowhere"], ["12", "3", "--only", "cifar10-l2-wrn-70-16"]],
    "export": [[], ["nowhere"], ["nowhere", "--format", "onnx"]],
    "verify": [[], ["nowhere.npz"], ["nowhere.npz", "--model", "digits"], ["nowhere.npz", "--run", "nowhere"]],
    "report": [[], ["nowhere"], ["nowhere", "--format", "pdf"]],
    "plot": [[], ["nowhere"], ["nowhere", "--what", "pie"], ["nowhere", "--channel", "-1"]],
    "models": [["--model", "nowhere"], ["--dataset", "nowhere"], ["--threat", "L3"]],
    "train": [["--preset", "long"], ["--epochs", "0"], ["--eps", "0"], ["--momentum", "1"]],
}
CALIBRATION = ["calibrate", "--model", "digits", "--run", "calibrated", "--n-examples", "60"]
CALIBRATED = ["--run", "calibrated", "--n-examples", "4"]
WRONG_AFTER_CALIBRATION = {
    name: [
        [name, *CALIBRATED, *call]
        for call in (
            [*chosen, "--attack", "apgd-cee"],
            [*chosen, "--eps", "8"],
            [*chosen, "--model", "resnet18-w16"],
            [*chosen, "--n-examples", "5000"],
            [*chosen, "--sites", "no-such-value"],
            *more,
        )
    ]
    for name, chosen, more in (
        ("sweep-alpha", [], [["--alphas", "0"]]),
        ("evaluate", ["--alpha", "0.1"], [[], ["--alpha", "-1"], ["--shard", "1/2"]]),
        ("measure", [], [["--alphas", "-1"]]),
    )
}

USUAL: tuple[Any, ...] = (None, False, [], [None, None], 1)
GROUP: Any = typer.main.get_command(app)
CONTEXT: Any = GROUP.context_class(GROUP, info_name="meansparse")
COMMANDS: list[str] = GROUP.list_commands(CONTEXT)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env=ENVIRONMENT)


def parameter(option: Any, context: Any) -> dict[str, Any]:
    """What a caller or a reader of the help can tell of an option or an argument; what is usual is left out."""
    facts = {
        "kind": option.param_type_name,
        "name": option.name,
        "spellings": option.opts,
        "negative": option.secondary_opts,
        "help": option.get_help_record(context),
        "panel": option.rich_help_panel,
        "type": inspect.formatannotation(option.type_descriptor.annotation).replace("pathlib._local.", "pathlib."),
        "range": [option.min, option.max],
        "metavar": option.metavar,
        "required": option.required,
        "multiple": getattr(option, "multiple", False),
        "values": option.nargs,
        "is_flag": getattr(option, "is_flag", False),
        "is_eager": option.is_eager,
        "hidden": option.hidden,
        "environment": option.envvar,
    }
    default = option.default if isinstance(option.default, bool | int | float | None) else str(option.default)
    return {key: value for key, value in facts.items() if value not in USUAL} | {"default": default}


def command_named(name: str) -> dict[str, Any]:
    command = GROUP.get_command(CONTEXT, name) if name else GROUP
    context = command.context_class(command, info_name=name, parent=CONTEXT) if name else CONTEXT
    return {
        "help": command.help,
        "epilog": command.epilog,
        "parameters": [parameter(option, context) for option in command.params],
        "printed": printed_help(*([name] if name else [])),
    }


def printed_help(*arguments: str) -> list[str]:
    """``--help`` at 200 columns, without colour; runs of spaces and rules are shortened."""
    result = invoke(*arguments, "--help")
    assert result.exit_code == 0, result.output
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
    return [re.sub("─+", "─", re.sub("  +", "  ", line)).rstrip() for line in text.splitlines()]


def wrong_calls(name: str) -> list[list[str]]:
    """Calls of one command that fail before anything is computed."""
    options = {option.opts[0]: option for option in GROUP.get_command(CONTEXT, name).params if option.opts[0][0] == "-"}
    arguments = {"table": ["2"], "plot": ["nowhere"], "export": ["nowhere"], "report": ["nowhere"]}.get(name, [])
    arguments = ["nowhere.npz"] if name == "verify" else arguments
    model = ["--model", "digits"] if "--model" in options else []
    calls = [[*arguments, "--no-such-option"]]
    for spelling, option in options.items():
        if spelling in WRONG_VALUES and name != "models":
            calls += [[*arguments, spelling, value] for value in WRONG_VALUES[spelling]]
        elif not (option.is_flag or spelling in TAKES_ANY_TEXT or name == "run" and spelling in ASKED_LATE):
            calls.append([*arguments, *model, spelling, NO_VALUE])
    return [[name, *call] for call in calls + WRONG_CALLS.get(name, [])]


def answers(name: str) -> dict[str, dict[str, Any]]:
    """Exit code, stdout and message of every wrong call, in the working folder, which has to be empty."""
    for file, text in FILES.items():
        Path(file).write_text(text)
    after = WRONG_AFTER_CALIBRATION.get(name, [])
    if after:
        assert invoke(*CALIBRATION).exit_code == 0
    recorded = {}
    for call in wrong_calls(name) + after:
        result = invoke(*call)
        assert result.exception is None or isinstance(result.exception, SystemExit), (call, result.exception)
        recorded[" ".join(call)] = {
            "exit_code": result.exit_code,
            "stdout": result.stdout,
            "message": message(result.stderr),
        }
    return recorded


def message(stderr: str) -> str:
    """The words in the box around an error, however wide it is; without a box the first line."""
    boxed = [line.strip("│ ") for line in stderr.splitlines() if line.startswith("│")]
    return " ".join(filter(None, boxed)) if boxed else stderr.partition("\n")[0]


@pytest.fixture(scope="module")
def golden() -> Any:
    return json.loads(RECORDED.read_text())


def compare(found: Any, expected: Any) -> None:
    assert found == expected, f"the command line has changed; if that is meant: {RECORD}"


def test_the_commands_in_their_order(golden: Any) -> None:
    compare(COMMANDS, list(golden["wrong_calls"]))


@pytest.mark.parametrize("name", ["", *COMMANDS], ids=lambda name: name or "meansparse")
def test_options_and_help(name: str, golden: Any) -> None:
    compare(as_json(command_named(name)), golden["commands"].get(name))


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_calls(name: str, golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compare(answers(name), golden["wrong_calls"].get(name))


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def write() -> None:
    """Record the command line as it is now."""
    os.environ.pop("MEANSPARSE_DATA", None)
    wrong = {}
    for name in COMMANDS:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            os.environ["MEANSPARSE_CACHE"] = "cache"
            wrong[name] = answers(name)
    recorded = {"commands": {name: command_named(name) for name in ["", *COMMANDS]}, "wrong_calls": wrong}
    RECORDED.parent.mkdir(exist_ok=True)
    RECORDED.write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: {RECORD}")
    write()
