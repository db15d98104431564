"""What others wrote, read in one place: refused in one sentence where it is damaged, too large or made to do harm."""

import codecs
import json
import re
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .errors import MeanSparseError

LARGEST = 2**24
"""Bytes of a YAML or JSON file; the longest report of a sweep has a tenth of it."""
DEEPEST = 100
MOST_VALUES = 2_000_000
"""With each alias counted as what it stands for: a few lines of YAML can mean more than a memory holds."""


def visible(text: str, keep: str = "\n\t") -> str:
    r"""``text`` without a character that a terminal or a page obeys, or cannot encode; each becomes its escape.

    >>> visible("a\x1b[31m\u202e")
    'a\\x1b[31m\\u202e'
    """
    if text.isprintable():
        return text
    harmless = (c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs" else "" for c in text)
    return "".join(kept or c.encode("unicode_escape").decode() for kept, c in zip(harmless, text, strict=True))


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def reading(refusal: type[MeanSparseError], what: str, hint: str | None = None) -> Iterator[None]:
    """Whatever goes wrong inside, down to a RecursionError of a file that refers to itself, becomes a ``refusal``."""
    try:
        yield
    except MeanSparseError:
        raise
    except Exception as error:
        says = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        if isinstance(error, LookupError | TypeError | AttributeError):
            says = f"{type(error).__name__}: {says}"
        raise refusal(f"{what}: {says}", hint=hint) from error


def read_text(path: Path) -> str:
    """A text in UTF-8, or in UTF-16 that says so. Raises OSError, or ValueError for what is none or is too large."""
    if path.exists() and not path.is_dir() and not path.is_file():
        raise ValueError("it is a device or a pipe, expected a file")
    with open(path, "rb") as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError(f"it has more than {LARGEST >> 20} MiB")
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 (byte {error.start})") from error


def read_yaml(path: Path, refusal: type[MeanSparseError], *, hint: str | None = None) -> Any:
    """Plain values out of a YAML file: dates stay text, ``7:12`` too; a key stands once. Raises ``refusal``."""
    with reading(refusal, f"{path} is not YAML", hint):
        text = read_text(path)
        try:
            _check(text)
            return yaml.load(text, _Loader)
        except yaml.MarkedYAMLError as error:
            line = getattr(error.problem_mark, "line", 0) + 1
            raise ValueError(f"{error.problem} in line {line}") from error


def parse_json(text: str | bytes) -> dict[str, Any]:
    """A JSON object out of a file or its header. Raises ValueError for anything else."""
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, expected keys and values")
    return found


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Without the types that only YAML 1.1 has: a date, and a number to the base of 60, which ``7:12`` would be."""


def _without(tag: str, pattern: re.Pattern[str]) -> re.Pattern[str] | None:
    if tag.endswith(":timestamp"):
        return None
    return (
        re.compile(f"(?![^\n]*:)(?:{pattern.pattern})", pattern.flags) if tag.endswith((":int", ":float")) else pattern
    )


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, kept) for tag, pattern in rules if (kept := _without(tag, pattern))]
    for letter, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


@dataclass
class _Open:
    """A collection that has begun: its anchor, its values so far with all that aliases stand for, and its keys."""

    anchor: str | None
    is_mapping: bool
    size: int = 1
    n_nodes: int = 0
    keys: set[str] = field(default_factory=set)


def _check(text: str) -> None:
    """Refuse what is nested too deeply, means too much, or gives a key twice; the parser alone looks, in one pass."""
    sizes: dict[str, int] = {}
    within: list[_Open] = []
    for event in yaml.parse(text, Loader=_Loader):
        anchor, size = getattr(event, "anchor", None), 1
        if isinstance(event, yaml.CollectionStartEvent):
            within.append(_Open(anchor, isinstance(event, yaml.MappingStartEvent)))
            if len(within) > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = within[-1].anchor, within.pop().size
        elif isinstance(event, yaml.AliasEvent):
            if anchor in {one.anchor for one in within}:
                raise ValueError(f"alias {anchor} contains itself")
            size = sizes.get(str(anchor), 1)
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        if anchor is not None:
            sizes[anchor] = size
        if within:
            _add(within[-1], event, size)


def _add(parent: _Open, event: Any, size: int) -> None:
    """Count one more value, which may be a key, of ``parent``."""
    parent.size, parent.n_nodes = parent.size + size, parent.n_nodes + 1
    if parent.size > MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {MOST_VALUES:,} values")
    if parent.is_mapping and parent.n_nodes % 2 and isinstance(event, yaml.ScalarEvent) and event.value != "<<":
        if event.value in parent.keys:
            raise ValueError(f"key {event.value!r} stands twice")
        parent.keys.add(event.value)
