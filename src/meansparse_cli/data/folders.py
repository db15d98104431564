"""Which files of a folder or a zip are pictures, and which class each has: the first folder below the part.

As torchvision's ImageFolder has it, whatever lies deeper. Hidden files, ``__MACOSX``, empty folders, files that are
no regular file and pictures of other kinds are left out and named.
"""

import logging
import os
import shlex
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from ..errors import DataError
from ..foreign import reading
from .pictures import SUFFIXES

log = logging.getLogger(__name__)

ClassOrder = Literal["text", "number"]
PARTS = {"train", "test", "val", "validation"}
OTHER_PICTURES = {
    *(".gif", ".heic", ".heif", ".avif", ".jp2", ".j2k", ".jfif", ".jpe", ".jxl", ".tga", ".pbm", ".pnm", ".ico"),
    *(".exr", ".hdr", ".psd", ".svg", ".dng", ".cr2", ".nef", ".npy", ".dcm"),
}


def list_pictures(source: Path) -> tuple[list[str], list[str]]:
    """The names of the pictures of a folder or a zip, in a fixed order, with ``/``; the class folder of each.

    Raises DataError where there are none, or folders that are no classes.
    """
    files, folders = _in_folder(source) if source.is_dir() else _in_zip(source)
    hidden = [name for name in (*files, *folders) if _is_hidden(name)]
    seen = [name for name in files if not _is_hidden(name)]
    names = [name for name in seen if name.lower().endswith(SUFFIXES) and "/" in name]
    others = [name for name in seen if os.path.splitext(name)[1].lower() in OTHER_PICTURES]
    outside = [name for name in seen if name.lower().endswith(SUFFIXES) and "/" not in name]
    level = 0 if source.is_dir() else _folders_around(names)
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
    below = {name.split("/")[level + 1] for name in names if name.count("/") > level + 1}
    if classes <= PARTS or (len(classes) == 1 < len(below)):
        part = source / min(classes)
        raise DataError(
            f"{source} holds {', '.join(sorted(classes))} with folders in it, which is no class folder",
            hint=f"if these are the classes: --dataset {shlex.quote(str(part))}"
            if source.is_dir()
            else "unpack it and name the folder around the classes",
        )
    return names, labels


def in_order(classes: Iterable[str], order: ClassOrder, where: str) -> list[str]:
    """The class folders in the order of the logits: as text, as ImageFolder has them, or as whole numbers."""
    by_text = sorted(classes)
    if others := [name for name in by_text if not (name.isascii() and name.isdigit())]:
        if order == "number":
            hint = "leave out --class-order number"
            raise DataError(f"{where}: class folder {others[0]!r} is no whole number", hint=hint)
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
    """Regular files and folders below ``root``, each once, whatever links lead to it; what else there is, is named.

    Links to folders come last and are followed where nothing else led there: what lies here goes by its own name.
    """
    ahead, links, seen = [("", os.path.realpath(root))], list[tuple[str, str]](), set[str]()
    files, linked, folders = list[tuple[str, str]](), list[tuple[str, str]](), list[str]()
    special: list[str] = []
    while ahead or links:
        prefix, folder = ahead.pop() if ahead else links.pop(0)
        if folder in seen:
            continue
        seen.add(folder)
        for entry in _entries(folder):
            name, is_link = prefix + entry.name, entry.is_symlink()
            real = os.path.realpath(entry.path) if is_link else entry.path
            if os.path.isdir(real) if is_link else entry.is_dir():
                folders.append(name)
                if not _is_hidden(entry.name):
                    (links if is_link else ahead).append((name + "/", real))
            elif os.path.isfile(real) if is_link else entry.is_file():
                (linked if is_link else files).append((name, real))
            elif name.lower().endswith(SUFFIXES):
                special.append(f"{name} ({'no regular file' if os.path.exists(real) else 'a link to nothing'})")
    _say_left_out(root, "entries that are no files", special)
    once = {real: name for name, real in files} if linked else {}
    twice = [name for name, real in sorted(linked) if once.setdefault(real, name) != name]
    _say_left_out(root, "further links to a picture that is there already", twice)
    names = once.values() if linked else (name for name, _ in files)
    return sorted(names, key=lambda name: name.split("/")), folders


def _entries(folder: str) -> list["os.DirEntry[str]"]:
    with reading(DataError, f"{folder} cannot be read"), os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _in_zip(source: Path) -> tuple[list[str], list[str]]:
    with reading(DataError, f"{source} is not a readable zip"), zipfile.ZipFile(source) as archive:
        members = archive.namelist()
    files = sorted({name for name in members if not name.endswith("/")})
    return files, [name.rstrip("/") for name in members if name.endswith("/")]


def _folders_around(names: Sequence[str]) -> int:
    """How many folders are around all class folders, as a zip of a folder has them."""
    level = 0
    while len({name.split("/")[level] for name in names}) == 1 and all(name.count("/") > level + 1 for name in names):
        level += 1
    return level


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
