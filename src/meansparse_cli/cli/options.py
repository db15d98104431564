"""The signature of a command, from the fields of its settings and arguments: same name, same help, same default."""

import inspect
from collections.abc import Callable
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from ..settings.commands import Command

Flags = dict[str, Any]
"""What was typed, by field of the settings; None where nothing was, so that a YAML file is asked before the default."""
Function = Callable[[Flags, Any], None]
"""What a command does with what was typed for its settings and with its arguments."""


def typer_function(command: Command, function: Function) -> Callable[..., None]:
    """A command's ``function``, with a signature that Typer makes options of."""

    def call(**typed: Any) -> None:
        given = {name: typed[name] for name in command.arguments.model_fields if name in typed}
        function({name: typed[name] for name in typed if name not in given}, command.arguments(**given))

    names = command.options.split() or command.arguments.model_fields
    call.__signature__ = inspect.Signature([_parameter(command, name) for name in names])  # type: ignore[attr-defined]
    return call


def _parameter(command: Command, name: str) -> inspect.Parameter:
    """One option: of a setting None where it was not given, of an argument its default."""
    is_setting = name in command.settings.model_fields
    field = (command.settings if is_setting else command.arguments).model_fields[name]
    shown: Any = field.json_schema_extra
    words = {"help": field.description, "metavar": shown["metavar"], "rich_help_panel": shown["panel"]}
    kind, default = _type_typed(field.annotation), field.default
    spellings = _spellings(name, field)
    if is_setting:
        words["show_default"] = _default_shown(field, spellings[0]) or shown["unset"] or True
        default = None
    else:
        words["min"] = next((rule.ge for rule in field.metadata if hasattr(rule, "ge")), None)
    if field.is_required():
        default = inspect.Parameter.empty
    elif default is None:
        kind |= None
    option = typer.Argument(**words) if shown["is_argument"] else typer.Option(*spellings, **words)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _spellings(name: str, field: FieldInfo) -> list[str]:
    """``--n-examples``; of a switch that can be put off as well: ``--racing/--no-racing``."""
    shown: Any = field.json_schema_extra
    word = name.replace("_", "-")
    has_no = shown["has_no"] if shown["has_no"] is not None else field.default is not False
    is_switch = _type_typed(field.annotation) is bool
    return shown["spelled"] or [f"--{word}/--no-{word}" if is_switch and has_no else f"--{word}"]


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
