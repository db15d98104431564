"""The commands, from ``commands.yaml``: what each is for, its settings, its other arguments, and its options."""

from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from . import arguments, stages, training

_CLASSES = vars(stages) | vars(training) | vars(arguments)


@dataclass(frozen=True)
class Command:
    """One command of ``meansparse``, in a ``group`` of the help.

    ``options``: the fields of ``settings`` and ``arguments``, in the order of its help. ``examples``: what somebody
    would type. ``shown``: how the help shows each option. ``is_stage``: one of those that ``run`` runs, in order.
    ``has_section``: a YAML file may have a section of that name.
    """

    name: str
    group: str
    help: str
    examples: tuple[str, ...]
    options: tuple[str, ...]
    shown: dict[str, dict[str, Any]]
    settings: type[arguments.Settings]
    arguments: type[arguments.Arguments]
    is_stage: bool
    has_section: bool

    @property
    def is_shared(self) -> bool:
        """Several workers may share it."""
        return issubclass(self.arguments, arguments.TrainArguments)


def _commands() -> dict[str, Command]:
    text = resources.files(__package__).joinpath("commands.yaml").read_text(encoding="utf-8")
    content = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # every start of the program waits for it
    shared = _shown(content["options"])
    return {name: _command(name, raw, shared) for name, raw in content["commands"].items()}


def _command(name: str, raw: dict[str, Any], shared: dict[str, dict[str, Any]]) -> Command:
    given = _CLASSES[raw.get("arguments", "StageArguments")]
    options = tuple(raw["options"].split() if "options" in raw else given.model_fields)
    shown = shared | _shown(raw.get("own", {}))
    settings = _CLASSES[raw.get("settings", "Settings")]
    is_stage = raw.get("is_stage", False)
    words, examples = (name, raw["group"], raw["help"]), tuple(raw["examples"])
    return Command(*words, examples, options, shown, settings, given, is_stage, raw.get("has_section", is_stage))


def _shown(panels: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        name: {"panel": panel} | ({"help": words} if isinstance(words, str) else words)
        for panel, options in panels.items()
        for name, words in options.items()
    }


COMMANDS = _commands()
STAGES = tuple(name for name, command in COMMANDS.items() if command.is_stage)
SECTIONS: dict[str, type[Any]] = {name: command.settings for name, command in COMMANDS.items() if command.has_section}
"""The sections that a YAML file may have."""
