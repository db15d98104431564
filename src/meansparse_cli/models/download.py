"""One file over HTTP, whole or not at all: resumed after a cut, checked, then moved to its name.

What arrives is kept in ``.NAME.part`` beside the target, with a note of where it comes from in ``.NAME.part.json``, so
that a run that was killed goes on where it stopped. Google Drive puts a page with a form in front of large files; the
form is read and sent. Any other page where a file was expected is an error, in the page's own words.
"""

import hashlib
import html.parser
import itertools
import json
import os
import re
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import requests

from ..errors import DownloadError, StorageError

CHUNK_BYTES = 1 << 16
PROGRESS_BYTES = 1 << 20
"""A new stretch of this many bytes starts the counting of retries afresh."""
LONGEST_PAGE_BYTES = 1 << 20
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
USER_AGENT = "Mozilla/5.0 (compatible; meansparse)"

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Downloaded:
    """A finished file: ``size`` in bytes, ``sha256`` as hex digits."""

    size: int
    sha256: str


def looks_like_html(head: bytes) -> bool:
    """Whether a file's first bytes are those of a web page."""
    text = head[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return text.startswith((b"<!", b"<html", b"<head", b"<body", b"<?xml", b"<title", b"<script"))


class _Interrupted(Exception):
    """The transfer stopped for a reason that may pass; the part that arrived is kept."""


def download(
    url: str,
    target: Path,
    *,
    expected_sha256: str | None = None,
    expected_size: int | None = None,
    session: requests.Session | None = None,
    connect_timeout: float = 20,
    stall_timeout: float = 60,
    retries: int = 4,
    pause: float = 1,
    on_progress: Progress | None = None,
) -> Downloaded:
    """Fetch ``url`` to ``target``; ``target`` is not there before the last byte has been checked.

    ``stall_timeout`` is the number of seconds without one byte after which the connection is given up;
    ``expected_sha256`` may be the beginning of a digest; ``pause`` seconds, doubled each time, lie between two of the
    ``retries``. ``on_progress(bytes_so_far, bytes_in_all)`` is called after each piece, the second None if unknown.
    Raises DownloadError (server, network, a page instead of a file, wrong size or digest) and StorageError (disk).
    """
    part = target.with_name(f".{target.name}.part")
    own_session = session is None
    http = requests.Session() if session is None else session
    timeouts = (connect_timeout, stall_timeout)
    n_failed, farthest = 0, 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        while True:
            had = _size(part)
            try:
                _receive(http, url, part, timeouts, on_progress)
                found = _check(url, part, expected_sha256, expected_size, was_resumed=had > 0)
                os.replace(part, target)
                _note(part).unlink(missing_ok=True)
                return found
            except _Interrupted as reason:
                n_failed = 0 if _size(part) >= farthest + PROGRESS_BYTES else n_failed + 1
                farthest = max(farthest, _size(part))
                if n_failed > retries:
                    raise DownloadError(f"{url}: {reason}, {n_failed} times ({_size(part):,} bytes kept)") from reason
                time.sleep(pause * 2 ** max(0, n_failed - 1))
    except requests.RequestException as error:  # before OSError, of which it is one
        raise DownloadError(f"{url}: {error}") from error
    except OSError as error:
        raise StorageError(
            f"cannot write {error.filename or target}: {error.strerror or error}",
            hint="free some space, or set MEANSPARSE_CACHE to another folder, then type the same command again",
        ) from error
    finally:
        if own_session:
            http.close()


def _receive(
    http: requests.Session, url: str, part: Path, timeouts: tuple[float, float], on_progress: Progress | None
) -> None:
    """Append what is still missing of ``url`` to ``part``."""
    note = _read_note(part, url)
    have = _size(part) if note is not None else 0
    # a coded body (gzip) would make both its length and its ranges meaningless
    headers = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT}
    if have and note is not None:
        headers["Range"] = f"bytes={have}-"
        if note["tag"]:
            headers["If-Range"] = str(note["tag"])
    try:
        with _open(http, url, headers, timeouts) as response:
            if response.status_code == 416:
                total = _total_in(response.headers.get("Content-Range", ""))
                if have and have == total:
                    return
                part.unlink(missing_ok=True)
                raise _Interrupted("the server has another file than before")
            if response.status_code in TRANSIENT:
                raise _Interrupted(f"the server answered {response.status_code} {response.reason}")
            if response.status_code not in (200, 206):
                raise DownloadError(f"{url}: the server answered {response.status_code} {response.reason}")
            total = _total(response)
            if response.status_code == 200:
                have = 0
                part.unlink(missing_ok=True)
            elif not _goes_on(response, have, note):
                part.unlink(missing_ok=True)
                raise _Interrupted(f"asked from byte {have}, the server sent another range")
            pieces = response.iter_content(CHUNK_BYTES)
            first = next(pieces, b"")
            if have == 0 and looks_like_html(first):
                raise DownloadError(f"{url}: a web page came instead of the file")
            _write_note(part, url, response, total)
            with open(part, "ab") as out:
                for piece in itertools.chain([first], pieces):
                    out.write(piece)
                    out.flush()  # so that a killed run finds it
                    have += len(piece)
                    if on_progress is not None:
                        on_progress(have, total)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        raise _Interrupted(_reason(error, timeouts)) from error
    if _size(part) != have:  # on a file system without locks
        part.unlink(missing_ok=True)
        raise _Interrupted("another download wrote into the same file")
    if total is not None and have < total:
        raise _Interrupted(f"the connection ended after {have:,} of {total:,} bytes")
    if total is not None and have > total:
        part.unlink(missing_ok=True)
        raise _Interrupted(f"{have:,} bytes came, {total:,} were announced")


def _open(
    http: requests.Session, url: str, headers: dict[str, str], timeouts: tuple[float, float]
) -> requests.Response:
    """The answer that carries the file: where a page with a download form comes first, the form's."""
    response = http.get(url, headers=headers, timeout=timeouts, stream=True)
    if response.status_code != 200 or not _says_html(response):
        return response
    with response:
        page = _read_page(response)
    following = _confirmed_url(page, response.url)
    if following is None:
        raise DownloadError(f"{url}: a web page came instead of the file: {_page_says(page)}")
    response = http.get(following, headers=headers, timeout=timeouts, stream=True)
    if response.status_code == 200 and _says_html(response):
        with response:
            page = _read_page(response)
        raise DownloadError(f"{url}: a web page came instead of the file: {_page_says(page)}")
    return response


def _total(response: requests.Response) -> int | None:
    """Length in bytes of the whole file, also where only its rest is sent; None if the server does not say."""
    if response.status_code == 206:
        return _total_in(response.headers.get("Content-Range", ""))
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdigit() else None


def _goes_on(response: requests.Response, have: int, note: dict[str, object] | None) -> bool:
    """Whether the answer is the rest, from byte ``have``, of the file that was begun."""
    starts_there = response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
    return starts_there and note is not None and note["total"] in (None, _total(response))


def _check(
    url: str, part: Path, expected_sha256: str | None, expected_size: int | None, *, was_resumed: bool
) -> Downloaded:
    """Compare with what is known of the file; a wrong one is removed."""
    digest = hashlib.sha256()
    with open(part, "rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
        os.fsync(handle.fileno())
    found = Downloaded(_size(part), digest.hexdigest())
    wrong = None
    if found.size == 0:
        wrong = "the file is empty"
    elif expected_size is not None and found.size != expected_size:
        wrong = f"{found.size:,} bytes came, expected {expected_size:,}"
    elif expected_sha256 is not None and not found.sha256.startswith(expected_sha256.lower()):
        wrong = f"sha256 is {found.sha256}, expected {expected_sha256}"
    if wrong is None:
        return found
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)
    if was_resumed:  # the two halves may be of two files: once more, from the start
        raise _Interrupted(wrong)
    raise DownloadError(f"{url}: {wrong}")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _write_note(part: Path, url: str, response: requests.Response, total: int | None) -> None:
    tag = response.headers.get("ETag", "")
    # a weak tag promises the same meaning, not the same bytes
    record = {"url": url, "tag": "" if tag.startswith("W/") else tag, "total": total}
    _note(part).write_text(json.dumps(record))


def _read_note(part: Path, url: str) -> dict[str, object] | None:
    """What is known of the part, or None if it is of another address or of nothing known."""
    try:
        note = json.loads(_note(part).read_text())
    except (FileNotFoundError, ValueError):
        return None
    known = isinstance(note, dict) and note.get("url") == url and {"tag", "total"} <= set(note)
    return note if known else None


def _total_in(content_range: str) -> int | None:
    match = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", content_range)
    return int(match.group(1)) if match else None


def _reason(error: Exception, timeouts: tuple[float, float]) -> str:
    text = str(error)
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {timeouts[0]:g} s"
    if isinstance(error, requests.Timeout) or "Read timed out" in text:
        return f"no byte came for {timeouts[1]:g} s"
    if "IncompleteRead" in text:
        return "the connection ended before the file did"
    return f"no connection: {text}"


def _says_html(response: requests.Response) -> bool:
    return "html" in response.headers.get("Content-Type", "").lower()


def _read_page(response: requests.Response) -> str:
    data = b""
    for piece in response.iter_content(CHUNK_BYTES):
        data += piece
        if len(data) > LONGEST_PAGE_BYTES:
            break
    return data.decode("utf-8", errors="replace")


class _DownloadForm(html.parser.HTMLParser):
    """Google Drive's "cannot scan this file for viruses" page: the form's address and its hidden fields."""

    def __init__(self) -> None:
        super().__init__()
        self.action: str | None = None
        self.link: str | None = None
        self.fields: dict[str, str] = {}
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "form" and given.get("id") in ("download-form", "downloadForm"):
            self.action, self._inside = given.get("action", ""), True
        elif tag == "input" and self._inside and "name" in given:
            self.fields[given["name"]] = given.get("value", "")
        elif tag == "a" and "export=download" in given.get("href", "") and "confirm=" in given["href"]:
            self.link = given["href"]

    def handle_endtag(self, tag: str) -> None:
        if tag == "form":
            self._inside = False


def _confirmed_url(page: str, page_url: str) -> str | None:
    """Where the page's form (or the link older pages have) leads, or None if it has neither."""
    form = _DownloadForm()
    form.feed(page)
    if form.action is None:
        return urllib.parse.urljoin(page_url, form.link) if form.link else None
    address = urllib.parse.urlsplit(urllib.parse.urljoin(page_url, form.action))
    fields = dict(urllib.parse.parse_qsl(address.query)) | form.fields
    return urllib.parse.urlunsplit(address._replace(query=urllib.parse.urlencode(fields)))


def _page_says(page: str) -> str:
    """The title and the explanation of an error page, for people."""
    parts = re.findall(r'(?is)<title>(.*?)</title>|<p class="uc-error-(?:sub)?caption">(.*?)</p>', page)
    text = " - ".join(re.sub(r"(?s)<[^>]+>|\s+", " ", a or b).strip() for a, b in parts)
    return text[:300] or "it has no title"
