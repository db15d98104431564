"""The signature of a command, from the fields of its settings and arguments: same name, same help, same default."""

import inspect
from collections.abc import Callable, Iterable
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from annotated_types import Ge
from pydantic.fields import FieldInfo

from ..attacks.catalogue import ATTACKS, PRESETS
from ..models.names import EMBEDDED, package_data
from ..reporting.console import phase
from ..settings.commands import Command
from ..settings.resolve import shipped_configs

ARGUMENTS, OPTIONS = "Arguments", "Options"
"""The panels that every help has without being told."""
COMPLETIONS: dict[str, Callable[[], Iterable[str]]] = {
    "attack": lambda: [*PRESETS, *ATTACKS],
    "model": lambda: [*EMBEDDED, *package_data("zoo.yaml")["headline"], "timm:", "torchvision:"],
    "config": shipped_configs,
}
"""By the name of a setting, what TAB offers behind it, once ``meansparse --install-completion`` was typed."""
Flags = dict[str, Any]
"""What was typed, by field of the settings; None where nothing was, so that a YAML file is asked before the default."""
Function = Callable[[Flags, Any], object]
"""What a command does with what was typed for its settings and with its arguments."""


def typer_function(command: Command, function: Function) -> Callable[..., None]:
    """A command's ``function``, with a signature that Typer makes options of."""

    def call(**typed: Any) -> None:
        given = {name: typed[name] for name in command.arguments.model_fields if name in typed}
        flags = {name: typed[name] for name in typed if name not in given}
        with phase(command.name):
            function(flags, command.arguments(**given))

    parameters = [_parameter(command, name) for name in command.options]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _parameter(command: Command, name: str) -> inspect.Parameter:
    """One option: of a setting None where it was not given, of an argument its default."""
    is_setting = name in command.settings.model_fields
    field, shown = (command.settings if is_setting else command.arguments).model_fields[name], command.shown[name]
    is_argument = shown["panel"] == ARGUMENTS
    panel = None if shown["panel"] in (ARGUMENTS, OPTIONS) else shown["panel"]
    words = {"help": shown["help"], "metavar": shown.get("metavar"), "rich_help_panel": panel}
    words["autocompletion"] = _offered(COMPLETIONS[name]) if name in COMPLETIONS else None
    kind, default = _type_typed(field.annotation), field.default
    spellings = _spellings(name, field, shown)
    if is_setting:
        words["show_default"] = _default_shown(field, spellings[0]) or shown.get("unset", True)
        default = None
    else:
        words["min"] = _least(field)
    if field.is_required():
        default = inspect.Parameter.empty
    elif default is None:
        kind |= None
    option = typer.Argument(**words) if is_argument else typer.Option(*spellings, **words)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _offered(known: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    return lambda incomplete: sorted(name for name in set(known()) if name.startswith(incomplete))


def _least(field: FieldInfo) -> Any:
    """The least value of a number, or of a number or None."""
    inner = (rule for kind in get_args(field.annotation) for rule in getattr(kind, "__metadata__", ()))
    return next((rule.ge for rule in (*field.metadata, *inner) if isinstance(rule, Ge)), None)


def _spellings(name: str, field: FieldInfo, shown: dict[str, Any]) -> list[str]:
    """``--n-examples``; of a switch that can be put off as well: ``--racing/--no-racing``."""
    word = name.replace("_", "-")
    has_no = _type_typed(field.annotation) is bool and shown.get("has_no", field.default is not False)
    return shown.get("spelled") or [f"--{word}/--no-{word}" if has_no else f"--{word}"]


def _default_shown(field: FieldInfo, spelling: str) -> str:
    """A default as the help shows it; nothing where there is none, or where a switch can only be put on."""
    default = field.default
    if isinstance(default, bool):
        on, _, off = spelling.partition("/")
        return (on if default else off).removeprefix("--")
    if isinstance(default, tuple):
        return ", ".join(map(str, default))
    return "" if default is None or field.is_required() else str(default)


def _type_typed(annotation: Any) -> Any:
    """The type of what is typed: the settings parse the text of a choice, of a number with rules, of a grid."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal or origin is tuple and inner[0] is float:
        return str
    if origin is tuple:
        return list[inner[0]]  # type: ignore[valid-type]
    if origin in (Annotated, Union, UnionType):  # of a type and its rules; of a type and None
        return _type_typed(inner[0])
    return annotation
