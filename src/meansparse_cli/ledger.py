"""What a computation keeps in a folder, so that it can be killed at any moment and go on with the same result.

    settings.json             what everything here depends on; ``<writer>-settings.json`` of each further writer
    <kind>/<number>.pt        pieces, appended, each written whole or not at all and never again
    <name>.pt                 states, each replaced as a whole; ``<writer>-<name>.pt``
    <name>.json               decisions, kept as they are made

Several writers (shards, ranks) may write at once, or into folders that are put together later: each has a prefix of its
own, and everybody reads what anybody wrote. All that is read back is checked: a zip by its checksums, JSON by a digest.
A damaged piece is named, set aside and done again; nothing else is.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import ArtifactError
from .files import load_torch, read_json, save_torch, set_aside, write_json

T = TypeVar("T")
SETTINGS = "settings.json"
COPY = ".copy"
"""What the name of the same file ends with, for the night when the other is damaged."""


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two sets of settings, each as ``key: then -> now``; a key that one lacks is None there.

    >>> changes({"seed": 0, "eps": "8/255"}, {"seed": 1, "eps": "8/255"})
    ['seed: 0 -> 1']
    """
    keys = sorted(before.keys() | now.keys())
    return [f"{k}: {shown(before.get(k))} -> {shown(now.get(k))}" for k in keys if before.get(k) != now.get(k)]


def shown(value: object) -> str:
    """A setting as a person compares it: a long one by its beginning and a short hash of the whole."""
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"


def key_digest(key: object) -> str:
    """16 hex digits that stand for ``key`` in the name of a file."""
    return hashlib.sha256(repr(key).encode()).hexdigest()[:16]


class Ledger:
    """A folder of results that all depend on ``key``.

    ``on_change`` says what becomes of a folder that was begun with another key: ``refuse`` raises ``ArtifactError``
    with the differences and ``mend``; ``beside`` gives each key a folder of its own inside ``folder``. ``parts`` (part
    -> what it does, such as an attack and its version) must agree for the parts that both know; further ones may join.
    ``writer`` is the prefix of this writer's files; ``mend(theirs)`` the hint for settings of ``theirs`` that
    differ. ``note`` is told of damaged pieces.
    """

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        *,
        on_change: Literal["refuse", "beside"] = "refuse",
        parts: Mapping[str, str] | None = None,
        writer: str | None = None,
        mend: Callable[[str | None], str] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self._note, self.prefix = note or (lambda text: None), "" if writer is None else f"{writer}-"
        self._mend = mend or (lambda theirs: "add --fresh to throw it away and start anew")
        text = json.dumps(dict(key), sort_keys=True, default=str)
        self.folder, self.key = folder, dict[str, Any](json.loads(text))
        if on_change == "beside":
            self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        else:
            self._agree(self.key, dict(parts or {}))

    # ---- pieces: appended, never changed

    def append(self, kind: str, content: dict[str, Any]) -> str:
        """Put a finished piece on disk; returns its name."""
        folder = self.folder / kind
        own = [file.stem.removeprefix(self.prefix) for file in folder.glob(f"{self.prefix}*.pt")]
        name = f"{self.prefix}{max((int(stem) for stem in own if stem.isdecimal()), default=-1) + 1:06d}"
        save_torch(folder / f"{name}.pt", content)
        return name

    def pieces(self, kind: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The whole pieces of all writers with their names, in order, one in memory at a time."""
        return self._each(self.folder / kind, "")

    # ---- states: each writer has its own, replaced as a whole

    def put(self, name: str, content: dict[str, Any]) -> None:
        save_torch(self.folder / f"{self.prefix}{name}.pt", content)

    def get(self, name: str) -> dict[str, Any] | None:
        """Our state ``name``; None where there is none, or a damaged one."""
        file = self.folder / f"{self.prefix}{name}.pt"
        return self._whole(file) if file.exists() else None

    def states(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The whole states ``name`` of all writers, with the names of their files."""
        return self._each(self.folder, name)

    # ---- decisions: made once

    def decisions(self, kind: str, key: object) -> "Decisions":
        """Those of one kind, which depend on ``key`` besides the outcomes."""
        return Decisions(self.folder / f"{kind}-{key_digest(key)}.json", self._note)

    def _each(self, folder: Path, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for file in sorted(folder.glob(f"*{name}.pt")):
            content = self._whole(file)
            if content is not None:
                yield file.stem, content

    def _whole(self, file: Path) -> dict[str, Any] | None:
        return _unless_damaged(file, load_torch, self._note, "done again")

    def _agree(self, now: dict[str, Any], parts: dict[str, str]) -> None:
        """Find every writer's settings to be those of ``now``, and put our own beside them."""
        own = self.folder / f"{self.prefix}{SETTINGS}"
        for copy in self.folder.glob(f"*{SETTINGS}{COPY}"):
            self._put_back(copy.with_suffix(""), copy)
        known: dict[str, str] = {}
        for file in sorted(self.folder.glob(f"*{SETTINGS}")):
            theirs = self._parts_of(file, now, parts)
            if file == own:
                known = theirs
        for piece in chain(self.folder.glob("*/*.pt"), self.folder.glob("*/*/*.pt")):
            file = self.folder / f"{_prefix_of(piece.stem)}{SETTINGS}"
            if not file.exists():
                raise ArtifactError(
                    f"{self.folder} has outcomes and no {file.name}", hint=self._mend(writer_of(piece.stem))
                )
        copy = own.with_name(own.name + COPY)
        if not parts.items() <= known.items() or not own.exists() or not _holds_settings(copy):
            for file in (own, copy):
                if file.is_dir():
                    set_aside(file)
                write_json(file, now | {"attacks": known | parts})

    def _put_back(self, file: Path, copy: Path) -> None:
        """Mend damaged or missing settings, without which no outcome can be used."""
        if _holds_settings(file):
            return
        with contextlib.suppress(ArtifactError):
            content = _settings_in(copy, "")
            if os.path.lexists(file):
                set_aside(file)
            write_json(file, content)
            self._note(f"{file} was damaged or gone: put back from its copy")

    def _parts_of(self, file: Path, now: dict[str, Any], parts: dict[str, str]) -> dict[str, str]:
        """The parts in a file of settings, once both are found to agree with ours."""
        theirs = writer_of(file.stem)
        before = _settings_in(file, self._mend(theirs))
        known: dict[str, str] = before.pop("attacks")
        differing = changes(before, now)
        differing += [f"attack {k}: {known[k]} -> {parts[k]}" for k in parts if known.get(k, parts[k]) != parts[k]]
        if differing:
            what = f"{theirs} in {self.folder} has" if theirs else f"{self.folder} holds an evaluation with"
            lines = "\n".join(f"  {line}" for line in differing)
            raise ArtifactError(f"{what} other settings (then -> now):\n{lines}", hint=self._mend(theirs))
        return known


class StateFile:
    """One state in a file of its own, which also holds, under ``key_name``, all that it depends on.

    ``on_change``: a state that was begun with another key is refused, or its owner is told and begins anew. What
    ``key`` lacks does not count.
    """

    def __init__(
        self,
        file: Path,
        key: Mapping[str, Any],
        *,
        key_name: str = "settings",
        on_change: Literal["refuse", "restart"] = "refuse",
        mend: str = "add --fresh to throw it away and start anew",
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.file, self.key, self.key_name = file, dict(key), key_name
        self.on_change, self.mend, self._note = on_change, mend, note or (lambda text: None)

    def get(self) -> dict[str, Any] | None:
        """The state; None where there is none to go on with."""
        if not self.file.exists():
            return None
        if (state := _unless_damaged(self.file, self._read, self._note, "begun anew")) is None:
            return None
        before, content = state
        differing = changes({key: before.get(key) for key in self.key}, self.key)
        if not differing:
            return content
        begun = f"{self.file} was begun with other settings ({', '.join(differing)})"
        if self.on_change == "refuse":
            raise ArtifactError(begun, hint=self.mend)
        self._note(f"{begun}: begun anew")
        return None

    def _read(self, file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        try:
            content = load_torch(file)
            return content.pop(self.key_name), content
        except (AttributeError, KeyError, TypeError) as error:
            raise ArtifactError(f"{file} is no state with {self.key_name}") from error

    def put(self, content: Mapping[str, Any]) -> None:
        save_torch(self.file, {self.key_name: self.key, **content})


class Decisions:
    """Decisions of a computation that may be killed, on disk as they are made: outcomes change afterwards.

    Where the file is damaged, ``note`` is told and they are made again.
    """

    def __init__(self, file: Path, note: Callable[[str], None]) -> None:
        self.file = file
        there = _unless_damaged(file, read_json, note, "decided again") if os.path.lexists(file) else None
        self.entries: dict[str, Any] = there or {}

    def once(self, name: str, decide: Callable[[], Any]) -> Any:
        """What was decided under ``name``, or what ``decide`` returns now, which is kept. Plain JSON values."""
        if name not in self.entries:
            self.entries[name] = decide()
            write_json(self.file, self.entries)
        return self.entries[name]

    def keep(self, entries: Mapping[str, Any]) -> None:
        self.entries = dict(entries)
        write_json(self.file, self.entries)


def _unless_damaged(file: Path, read: Callable[[Path], T], note: Callable[[str], None], then: str) -> T | None:
    """What ``read`` gives; None for a damaged file, which is set aside. ``then`` tells ``note`` what follows."""
    with contextlib.suppress(ArtifactError):
        return read(file)
    note(f"{file} is damaged: set aside as {set_aside(file).name}, and {then}")
    return None


def recorded(folder: Path, name: str) -> Any:
    """A setting of whatever was begun in ``folder`` or below it; None where nothing was."""
    return next(_recorded(folder, f"**/*{SETTINGS}", name), None)


def is_begun_with(folder: Path, name: str, value: object) -> bool:
    """Whether any writer began right in ``folder`` with ``value`` as the setting ``name``."""
    return any(begun == value for begun in _recorded(folder, f"*{SETTINGS}", name))


def _recorded(folder: Path, pattern: str, name: str) -> Iterator[Any]:
    for file in sorted(folder.glob(pattern)):
        with contextlib.suppress(ArtifactError):  # a damaged file is refused where it is used
            yield read_json(file).get(name)


def writer_of(stem: str) -> str | None:
    """The writer of a file: ``shard-1-of-8-000003`` -> ``shard-1-of-8``, ``000003`` -> None."""
    return _prefix_of(stem).removesuffix("-") or None


def _prefix_of(stem: str) -> str:
    name, dash, _ = stem.rpartition("-")
    return name + dash


def _holds_settings(file: Path) -> bool:
    with contextlib.suppress(ArtifactError):
        return bool(_settings_in(file, ""))
    return False


def _settings_in(file: Path, hint: str) -> dict[str, Any]:
    try:
        content = read_json(file)
        return content | {"attacks": dict(content["attacks"].items())}
    except (ArtifactError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file} cannot be read: {getattr(error, 'message', error)}", hint=hint) from error
