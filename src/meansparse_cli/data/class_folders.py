"""The one place where a folder, or a zip of one, becomes pictures and classes.

As torchvision's ``ImageFolder`` has it, the class of a picture is the first folder below the part, whatever lies
deeper. A zip may have folders around that one. What is left out is named.
"""

import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import DataError
from .pictures import SUFFIXES

ClassOrder = Literal["text", "number"]
PARTS = {"train", "test", "val", "validation"}
OTHER_KINDS = (
    ".gif .apng .jp2 .j2k .jfif .jpe .heic .heif .avif .jxl .tga .pnm .pbm .pcx .ico .svg .psd .exr .hdr .dcm .npy"
)
LARGEST_FILE = 2**30


@dataclass
class ClassFolders:
    """``names``: every picture, relative to the source, ``labels``: its class; ``notes``: what a reader must know."""

    names: list[str]
    labels: list[int]
    classes: list[str]
    notes: list[str] = field(default_factory=list)


def find_classes(source: Path, order: ClassOrder | None) -> ClassFolders:
    """Raises DataError where there is none, where a picture is no regular file, and for a broken or encrypted zip."""
    files, folders = _in_folder(source) if source.is_dir() else (_in_zip(source), set())
    kept = [name for name in files if not _junk_in(name)]
    depth = 0 if source.is_dir() else _folders_around(kept)
    known = [name for name in kept if name.lower().endswith(SUFFIXES)]
    names = sorted((n for n in known if n.count("/") > depth), key=lambda name: name.split("/"))
    of_name = {name: name.split("/")[depth] for name in names}
    classes = sorted(set(of_name.values()))
    if not classes:
        raise DataError(
            f"no images in {source}", hint=f"expected CLASS/NAME with one of {', '.join(SUFFIXES)}, one folder a class"
        )
    _check_level(source, classes, names, depth)
    folders |= {name.split("/")[depth] for name in kept if name.count("/") > depth}
    junk = {_junk_in(n) for n in [*folders, *files] if n in folders or n.lower().endswith(SUFFIXES)} - {""}
    left_out = {
        "hidden or made by a tool": junk,
        "class folders without pictures": {n for n in folders if "/" not in n} - {*classes, *junk},
        "pictures in no class folder": set(known) - set(names),
        "files of other kinds": {name for name in kept if name.lower().endswith(tuple(OTHER_KINDS.split()))},
    }
    notes = [f"{source}: left out, {what}: {_some(found)}" for what, found in left_out.items() if found]
    if all(name.isascii() and name.isdigit() for name in classes):
        by_number = sorted(classes, key=lambda name: (int(name), name))
        if by_number != classes:
            classes = by_number if order == "number" else classes
            notes.append(_order_note(source, classes, order))
    numbers = {name: number for number, name in enumerate(classes)}
    return ClassFolders(names, [numbers[of_name[name]] for name in names], classes, notes)


def _order_note(source: Path, classes: list[str], order: ClassOrder | None) -> str:
    logits = ", ".join(f"{i}: {name}" for i, name in enumerate(classes[:12])) + (", ..." if len(classes) > 12 else "")
    now, other = ("number", "text") if order == "number" else ("text, as ImageFolder has it", "number")
    return (
        f"{source}: class folders are whole numbers, in the order of their {now} (logit: folder): {logits}; "
        f"--class-order {other} is the other order"
    )


def _check_level(source: Path, classes: list[str], names: list[str], depth: int) -> None:
    """Refuse a folder that is one too high: its class folders would be the parts, or one folder around them all."""
    below = {name.split("/")[depth + 1] for name in names if name.count("/") > depth + 1}
    if set(classes) <= PARTS:
        hint = f"name the part: --dataset {source / classes[0]}" if source.is_dir() else "unpack it"
        raise DataError(f"{source} holds {' and '.join(classes)}, which are parts, not classes", hint=hint)
    if len(classes) == 1 and len(below) > 1 and source.is_dir():
        raise DataError(
            f"{source} holds one class folder, {classes[0]}, and folders in it: {_some(below)}",
            hint=f"if these are the classes: --dataset {source / classes[0]}",
        )


def _is_junk(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _junk_in(name: str) -> str:
    """``cat/.cache/a.png`` -> ``cat/.cache``; nothing where no part of the name is hidden or made by a tool."""
    parts = name.split("/")
    return next(("/".join(parts[: i + 1]) for i, part in enumerate(parts) if _is_junk(part)), "")


def _some(names: set[str]) -> str:
    first = ", ".join(ascii(name)[1:-1] for name in sorted(names)[:5])
    return first + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _folders_around(names: list[str]) -> int:
    """How many folders of a zip hold nothing but the next one."""
    parts = [name.split("/") for name in names if name.lower().endswith(SUFFIXES)]
    depth = 0
    while len({p[depth] for p in parts if len(p) > depth + 1}) == 1 and any(len(p) > depth + 2 for p in parts):
        depth += 1
    return depth


def _in_folder(root: Path) -> tuple[list[str], set[str]]:
    """Every file and folder below ``root``; each once, whatever symbolic links lead to it."""
    ahead, links, seen = [("", os.path.realpath(root))], list[tuple[str, str]](), set[str]()
    files, linked, folders = list[tuple[str, str]](), list[tuple[str, str]](), set[str]()
    while ahead or links:  # links come last: a folder goes by its own name where it has one here
        folder, real = ahead.pop() if ahead else links.pop(0)
        if real in seen:
            continue
        seen.add(real)
        for name, entry in _entries(root / folder, folder):
            target = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            if entry.is_dir():
                folders.add(name)
                if not _junk_in(name):
                    (links if entry.is_symlink() else ahead).append((name, target))
                continue
            if not entry.is_file() and name.lower().endswith(SUFFIXES):
                what = "a device, a FIFO or a socket" if os.path.exists(entry.path) else "a link that leads nowhere"
                raise DataError(f"{root / name} is no picture, but {what}", hint="take it out of the folder")
            (linked if entry.is_symlink() else files).append((name, target))
    once = {target: name for name, target in files} if linked else {}
    for name, target in sorted(linked):
        if once.setdefault(target, name) == name:
            files.append((name, target))
    return [name for name, _ in files], folders


def _entries(path: Path, folder: str) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    try:
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                entry.is_dir()  # raises for a link in a circle of links
                yield f"{folder}/{entry.name}" if folder else entry.name, entry
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {error.strerror}") from error


def _in_zip(source: Path) -> list[str]:
    """Every member that is no folder, once."""
    hint = "expected an image folder, a zip of one, or an .npz"
    if not source.is_file():
        raise DataError(f"{source} is no regular file", hint=hint)
    try:
        with zipfile.ZipFile(source) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
    except Exception as error:  # zipfile raises what it likes on a broken file
        raise DataError(f"{source} is not a readable zip: {error}", hint=hint) from error
    for member in members:
        if member.filename.lower().endswith(SUFFIXES) and member.flag_bits & 1:
            raise DataError(f"{source}: {member.filename} is encrypted", hint="unpack it and give the folder")
    return list(dict.fromkeys(member.filename for member in members))
