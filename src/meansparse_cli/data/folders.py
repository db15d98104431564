"""Which files of a folder or a zip are pictures, and which class each has: the first folder below the part.

As torchvision's ImageFolder has it, whatever lies deeper. Hidden files, ``__MACOSX``, empty folders, files that are
no regular file and pictures of other kinds are left out and named.
"""

import logging
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import DataError
from .pictures import SUFFIXES

log = logging.getLogger(__name__)

ClassOrder = Literal["text", "number"]
PARTS = {"train", "test", "val", "validation"}
OTHER_PICTURES = {
    *(".gif", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jfif", ".jpe", ".jxl", ".tga", ".pbm", ".pnm", ".ico"),
    *(".exr", ".hdr", ".psd", ".svg", ".dng", ".cr2", ".nef", ".npy", ".dcm"),
}


@dataclass(frozen=True)
class Listing:
    """``names`` of the pictures in a fixed order, with ``/``; ``labels``: the folder that is the class of each."""

    names: list[str]
    labels: list[str]


def list_pictures(source: Path) -> Listing:
    """The pictures of a folder or a zip. Raises DataError where there are none, or folders that are no classes."""
    files, folders = _in_folder(source) if source.is_dir() else _in_zip(source)
    hidden = [name for name in (*files, *folders) if _is_hidden(name)]
    seen = [name for name in files if not _is_hidden(name)]
    names = [name for name in seen if name.lower().endswith(SUFFIXES) and "/" in name]
    others = [name for name in seen if os.path.splitext(name)[1].lower() in OTHER_PICTURES]
    outside = [name for name in seen if name.lower().endswith(SUFFIXES) and "/" not in name]
    level = 1 if not source.is_dir() and _has_one_folder(names) else 0
    labels = [name.split("/")[level] for name in names]
    classes = set(labels)
    empty = {name.split("/")[level] for name in folders if name.count("/") == level and not _is_hidden(name)} - classes
    _say_left_out(source, "pictures of other kinds", others)
    _say_left_out(source, "pictures outside any class folder", outside)
    _say_left_out(source, "hidden files and folders", _outermost(hidden))
    _say_left_out(source, "folders without pictures", sorted(empty - {name.split("/")[0] for name in hidden}))
    if not names:
        raise DataError(
            f"no images in {source}",
            hint=f"expected CLASS/NAME with one of {', '.join(SUFFIXES)}, one folder a class",
        )
    if len(classes) > 1 and classes <= PARTS:
        raise DataError(
            f"{source} holds {', '.join(sorted(classes))}, which are parts and no classes",
            hint="unpack it and name the folder around them",
        )
    return Listing(names, labels)


def in_order(classes: Iterable[str], order: ClassOrder, where: str) -> list[str]:
    """The class folders in the order of the logits: as text, as ImageFolder has them, or as whole numbers."""
    by_text = sorted(classes)
    if not all(name.isascii() and name.isdigit() for name in by_text):
        if order == "number":
            other = next(name for name in by_text if not (name.isascii() and name.isdigit()))
            raise DataError(
                f"{where}: class folder {other!r} is no whole number", hint="leave out --class-order number"
            )
        return by_text
    by_number = sorted(by_text, key=lambda name: (int(name), name))
    chosen = by_number if order == "number" else by_text
    if by_number != by_text:
        some = ", ".join(f"{name} is logit {place}" for place, name in enumerate(chosen[:12]))
        other = "text" if order == "number" else "number"
        log.warning(
            f"{where}: class folders are whole numbers, taken in the order of {order}s: {some}"
            f"{', ...' if len(chosen) > 12 else ''}; --class-order {other} takes the other order"
        )
    return chosen


def _in_folder(root: Path) -> tuple[list[str], list[str]]:
    """Regular files and folders below ``root``, each once, whatever links lead to it; what else there is, is named."""
    files: list[str] = []
    folders: list[str] = []
    special: list[str] = []
    has_links = False
    above: dict[str, tuple[str, ...]] = {"": (os.path.realpath(root),)}
    for folder, inner, here in os.walk(root, followlinks=True):
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        prefix = "" if prefix == "./" else prefix
        lineage = above.pop(prefix, (os.path.realpath(folder),))
        for name in list(inner):
            real = os.path.realpath(os.path.join(folder, name))
            if real in lineage:
                inner.remove(name)  # a link to a folder that it lies in
                special.append(f"{prefix}{name} (a loop)")
                continue
            has_links |= os.path.islink(os.path.join(folder, name))
            folders.append(prefix + name)
            above[f"{prefix}{name}/"] = (*lineage, real)
        for name in here:
            entry = os.path.join(folder, name)
            if name.lower().endswith(SUFFIXES):
                try:
                    mode = os.stat(entry).st_mode
                except OSError:
                    special.append(f"{prefix}{name} (a link to nothing)")
                    continue
                if not stat.S_ISREG(mode):
                    special.append(f"{prefix}{name} (no regular file)")
                    continue
            has_links |= os.path.islink(entry)
            files.append(prefix + name)
    _say_left_out(root, "entries that are no files", special)
    files.sort(key=lambda name: name.split("/"))
    return (_each_once(root, files) if has_links else files), folders


def _each_once(root: Path, files: list[str]) -> list[str]:
    """Each file once, by the name that is no link where there is one."""
    by_file: dict[str, str] = {}
    twice = []
    for name in files:
        path = os.path.join(os.path.realpath(root), name)
        real = os.path.realpath(path)
        if real in by_file:
            twice.append(name if real != path else by_file[real])
        if real not in by_file or real == path:
            by_file[real] = name
    _say_left_out(root, "further links to a picture that is there already", twice)
    kept = set(by_file.values())
    return [name for name in files if name in kept]


def _in_zip(source: Path) -> tuple[list[str], list[str]]:
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{source} is not a readable zip: {error}") from error
    files = sorted({name for name in members if not name.endswith("/")})
    return files, [name.rstrip("/") for name in members if name.endswith("/")]


def _has_one_folder(names: Sequence[str]) -> bool:
    """Whether one folder is around all class folders, as a zip of a folder has it."""
    return len({name.split("/")[0] for name in names}) == 1 and all(name.count("/") >= 2 for name in names)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def _outermost(hidden: Sequence[str]) -> list[str]:
    """The hidden part of each name, once."""

    def cut(name: str) -> Iterator[str]:
        for part in name.split("/"):
            yield part
            if _is_hidden(part):
                return

    return sorted({"/".join(cut(name)) for name in hidden})


def _say_left_out(source: Path, what: str, names: Sequence[str]) -> None:
    if names:
        some = ", ".join(names[:5])
        log.warning(f"{source}: {len(names):,} {what} left out: {some}{', ...' if len(names) > 5 else ''}")
