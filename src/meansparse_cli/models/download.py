"""One file over HTTP, whole or not at all: resumed after a cut, checked, then moved to its name.

What arrives waits in ``.NAME.part``, with a note of where it comes from, so that a killed run goes on where it stopped.
"""

import itertools
import os
import re
import time
import urllib.parse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import requests

from ..errors import ArtifactError, DownloadError, StorageError
from ..files import read_json, sha256_of, write_json
from .weights import looks_like_html

CHUNK_BYTES = 1 << 16
PROGRESS_BYTES = 1 << 20
"""A new stretch of this many bytes starts the counting of retries afresh."""
CONNECT_TIMEOUT = 20.0
STALL_TIMEOUT = 60.0
"""Seconds without one byte after which the connection is given up."""
RETRIES = 4
PAUSE = 1.0
"""Seconds before the first retry; doubled each time."""
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
# a coded body (gzip) would make both its length and its ranges meaningless
HEADERS = {"Accept-Encoding": "identity", "User-Agent": "Mozilla/5.0 (compatible; meansparse)"}

Progress = Callable[[int, int | None], None]


class _Interrupted(Exception):
    """The transfer stopped for a reason that may pass; the part that arrived is kept."""


class _Part:
    """What has arrived of ``url``, and the note of which file it is the beginning of.

    Unless the whole ``is_checked`` in the end, a part of which the server did not say which file it is of is of no use.
    """

    def __init__(self, url: str, target: Path, *, is_checked: bool) -> None:
        self.url, self.is_checked = url, is_checked
        self.path = target.with_name(f".{target.name}.part")
        self.note = self.path.with_name(f"{self.path.name}.json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)

    def write_note(self, response: requests.Response) -> None:
        write_json(self.note, {"url": self.url, "tag": _tag(response), "total": _total(response)})

    def read_note(self) -> dict[str, Any]:
        """``tag`` and ``total`` of the file that was begun; {} if the part is of another address, or nothing tells."""
        try:
            note = read_json(self.note)
        except ArtifactError:
            return {}
        is_ours = note.keys() == {"url", "tag", "total"} and note["url"] == self.url
        return note if is_ours and (note["tag"] or self.is_checked) else {}


def download(
    url: str, target: Path, *, expected_sha256: str | None = None, on_progress: Progress | None = None
) -> None:
    """Fetch ``url`` to ``target``; ``target`` is not there before the last byte has been checked.

    ``expected_sha256`` may be the beginning of a digest. ``on_progress(bytes_so_far, bytes_in_all)`` is called after
    each piece, the second None if unknown. Raises DownloadError and, where the disk is at fault, StorageError.
    """
    part, n_failed, farthest = _Part(url, target, is_checked=expected_sha256 is not None), 0, 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with requests.Session() as http:
            while True:
                was_resumed = part.size > 0
                try:
                    _receive(http, part, on_progress)
                    _check(part, expected_sha256, was_resumed=was_resumed)
                    os.replace(part.path, target)
                    part.note.unlink(missing_ok=True)
                    return
                except _Interrupted as reason:
                    n_failed = 0 if part.size >= farthest + PROGRESS_BYTES else n_failed + 1
                    farthest = max(farthest, part.size)
                    if n_failed > RETRIES:
                        kept = f"{n_failed} times ({part.size:,} bytes kept)"
                        raise DownloadError(f"{url}: {reason}, {kept}") from reason
                    time.sleep(PAUSE * 2 ** max(0, n_failed - 1))
    except requests.RequestException as error:  # before OSError, of which it is one
        raise DownloadError(f"{url}: {error}") from error
    except OSError as error:
        hint = "free some space, or set MEANSPARSE_CACHE to another folder, then type the same command again"
        raise StorageError.of(error, f"cannot write {error.filename or target}", hint=hint) from error


def _receive(http: requests.Session, part: _Part, on_progress: Progress | None) -> None:
    """Append what is still missing of the file to its part."""
    note = part.read_note()
    have = part.size if note else 0
    headers = HEADERS | ({"Range": f"bytes={have}-"} if have else {})
    if have and note["tag"]:
        headers["If-Range"] = str(note["tag"])
    try:
        with _open(http, part.url, headers) as response:
            total = _total(response)
            if response.status_code == 416 and have and have == total:
                return
            have = _start_of(response, part, have, note)
            pieces = response.iter_content(CHUNK_BYTES)
            first = next(pieces, b"")
            if have == 0 and looks_like_html(first):
                raise DownloadError(f"{part.url}: a web page came instead of the file")
            part.write_note(response)
            with open(part.path, "ab") as out:
                for piece in itertools.chain([first], pieces):
                    out.write(piece)
                    out.flush()  # so that a killed run finds it
                    have += len(piece)
                    if on_progress is not None:
                        on_progress(have, total)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise _Interrupted(_reason(error)) from error
    wrong = None
    if part.size != have:  # on a file system without locks
        wrong = "another download wrote into the same file"
    elif total is not None and have > total:
        wrong = f"{have:,} bytes came, {total:,} were announced"
    if wrong is not None:
        part.discard()
        raise _Interrupted(wrong)
    if total is not None and have < total:
        raise _Interrupted(f"the connection ended after {have:,} of {total:,} bytes")


def _start_of(response: requests.Response, part: _Part, have: int, note: dict[str, Any]) -> int:
    """The byte of the file that the answer begins with: ``have``, or 0 after what had arrived was thrown away."""
    said = f"the server answered {response.status_code} {response.reason}"
    if response.status_code in TRANSIENT:
        raise _Interrupted(said)
    if response.status_code not in (200, 206, 416):
        raise DownloadError(f"{part.url}: {said}")
    starts_there = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    is_same = note and note["total"] in (None, _total(response)) and note["tag"] == _tag(response)
    if response.status_code == 206 and starts_there and is_same:
        return have
    part.discard()
    if response.status_code == 206:
        reason = "has another file than before" if starts_there else "sent another range"
        raise _Interrupted(f"asked from byte {have}, the server {reason}")
    if response.status_code == 416:
        raise _Interrupted("the server has another file than before")
    return 0


def _open(http: requests.Session, url: str, headers: dict[str, str]) -> requests.Response:
    """The response that holds the file: where a page with a download form comes first, the form's."""
    address: str | None = url
    for is_first in (True, False):
        response = http.get(str(address), headers=headers, timeout=(CONNECT_TIMEOUT, STALL_TIMEOUT), stream=True)
        if response.status_code != 200 or "html" not in response.headers.get("Content-Type", "").lower():
            return response
        with response:
            pieces = itertools.islice(response.iter_content(CHUNK_BYTES), 16)  # a page is not longer than this
            page = b"".join(pieces).decode("utf-8", errors="replace")
        address = _confirmed_address(page, response.url) if is_first else None
        if address is None:
            break
    raise DownloadError(f"{url}: a web page came instead of the file: {_page_says(page)}")


def _confirmed_address(page: str, page_url: str) -> str | None:
    """Where the form of Google Drive's "cannot scan this file for viruses" page leads; None for any other page."""
    from gdown.download import get_url_from_gdrive_confirmation
    from gdown.exceptions import FileURLRetrievalError

    line = " ".join(page.split())  # gdown looks for the form and its fields line by line
    try:
        # it calls what newer versions of Beautiful Soup warn of
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            return urllib.parse.urljoin(page_url, get_url_from_gdrive_confirmation(line))
    except (FileURLRetrievalError, KeyError):
        return None


def _page_says(page: str) -> str:
    """The title and the explanation of an error page, for people."""
    parts = re.findall(r'(?is)<title>(.*?)</title>|<p class="uc-error-(?:sub)?caption">(.*?)</p>', page)
    text = " - ".join(re.sub(r"(?s)<[^>]+>|\s+", " ", a or b).strip() for a, b in parts)
    return text[:300] or "it has no title"


def _tag(response: requests.Response) -> str:
    """The strong ETag (a weak one promises the same meaning, not the same bytes), else when the file was changed."""
    tag = str(response.headers.get("ETag", "W/"))
    return str(response.headers.get("Last-Modified", "")) if tag.startswith("W/") else tag


def _total(response: requests.Response) -> int | None:
    """Length in bytes of the whole file, also where only its rest is sent; None if the server does not say."""
    if response.status_code in (206, 416):
        length = response.headers.get("Content-Range", "").rpartition("/")[2]
    else:
        length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _check(part: _Part, expected_sha256: str | None, *, was_resumed: bool) -> None:
    """Compare with what is known of the file; a wrong one is removed."""
    with open(part.path, "rb") as handle:
        os.fsync(handle.fileno())
    found = sha256_of(part.path) if expected_sha256 is not None and part.size else ""
    if part.size and found.startswith((expected_sha256 or "").lower()):
        return
    wrong = f"sha256 is {found}, expected {expected_sha256}" if part.size else "the file is empty"
    part.discard()
    if was_resumed:  # the two halves may be of two files: once more, from the start
        raise _Interrupted(wrong)
    raise DownloadError(f"{part.url}: {wrong}")


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT:g} s"
    if isinstance(error, requests.Timeout) or "Read timed out" in text:
        return f"no byte came for {STALL_TIMEOUT:g} s"
    if "IncompleteRead" in text:
        return "the connection ended before the file did"
    return f"no connection: {text}"
