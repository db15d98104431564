"""One command's settings: its defaults, over them the environment, over it a YAML file, over it the flags.

In a YAML file a key at the top applies to every command that has it; a section named after a command
(``sweep-alpha: {n_examples: 500}``) applies to that command alone and wins.
"""

import difflib
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from ..errors import ConfigError
from ..foreign import read_yaml
from .commands import SECTIONS

DATA_VARIABLE = "MEANSPARSE_DATA"
Config = TypeVar("Config", bound=BaseModel)


def resolve(
    command: str, config_class: type[Config], file: Path | None, flags: dict[str, Any]
) -> tuple[Config, dict[str, str]]:
    """Merge default, environment (``MEANSPARSE_DATA``), YAML file and flags (None = not given) for one command.

    Returns the settings and, for each field, where its value came from. Raises ConfigError on an unknown key (with the
    nearest known one) and on a value that cannot be used.
    """
    layers: tuple[tuple[str, dict[str, Any]], ...] = (
        (DATA_VARIABLE, {"data_dir": os.environ[DATA_VARIABLE]} if os.environ.get(DATA_VARIABLE) else {}),
        (str(file), _read_config_file(file, command) if file is not None else {}),
        ("flag", {key: value for key, value in flags.items() if value is not None}),
    )
    merged: dict[str, Any] = {}
    sources = dict.fromkeys(config_class.model_fields, "default")
    for source, values in layers:
        for key in values.keys() & sources.keys():
            merged[key], sources[key] = values[key], source
    try:
        return config_class.model_validate(merged), sources
    except ValidationError as error:
        raise ConfigError("\n".join(_problem(item, sources) for item in error.errors())) from error


def _problem(item: Any, sources: dict[str, str]) -> str:
    """What pydantic found wrong, and which flag or file said it."""
    key = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    source = sources.get(str(item["loc"][0]), "") if item["loc"] else ""
    where = f"--{key.replace('_', '-')}" if source == "flag" else f"{key} in {source}"
    return f"{where}: {message} (found {item['input']!r})"


def _read_config_file(file: Path, command: str) -> dict[str, Any]:
    path = file if file.is_file() else shipped_configs().get(str(file), file)
    if not path.exists():
        raise ConfigError(f"no config file {file}", hint=f"by name: {', '.join(sorted(shipped_configs()))}")
    content = read_yaml(path, ConfigError, hint="expected keys and values, as in the configs/ of the repository") or {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} holds a {type(content).__name__}, expected keys and values")
    known = {key for cls in SECTIONS.values() for key in cls.model_fields}
    settings: dict[str, Any] = {}
    for key, value in content.items():
        if key not in SECTIONS:
            _check_key(str(key), known | set(SECTIONS), str(file))
            settings[str(key)] = value
    for section, cls in SECTIONS.items():
        values = content.get(section) or {}
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: section {section} holds {values!r}, expected keys and values")
        for key in values:
            _check_key(str(key), set(cls.model_fields), f"{file}, section {section}")
        if section == command:
            settings |= values
    return settings


def shipped_configs() -> dict[str, Path]:
    """The configs that come with ``meansparse``, by name: of the repository it runs from, or as they were installed."""
    folders = (Path(sys.prefix) / "share" / "meansparse" / "configs", Path(__file__).parents[3] / "configs")
    return {file.stem: file for folder in folders for file in folder.glob("*.yaml")}


def _check_key(key: str, known: set[str], where: str) -> None:
    if key in known:
        return
    near = difflib.get_close_matches(key.replace("-", "_"), known, n=1) or difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
    raise ConfigError(f"{where}: unknown key {key!r}", hint=hint)
