"""Downloads from a server of our own that stalls, cuts, redirects, and answers with pages."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from meansparse_cli.errors import DownloadError, StorageError
from meansparse_cli.files import read_json, write_json
from meansparse_cli.models import download as downloading
from meansparse_cli.models.download import download

BODY = b"PK" + bytes(range(256)) * 2000
CONFIRM_PAGE = """<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>
<form id="download-form" action="{action}" method="get"><input type="submit" value="Download anyway"/>
<input type="hidden" name="id" value="abc"><input type="hidden" name="confirm" value="t">
<input type="hidden" name="uuid" value="1-2&amp;3"></form></body></html>"""


class Server(ThreadingHTTPServer):
    """``/PLAN/...`` says how the answers go; ``requests_seen`` has (path, Range header)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests_seen: list[tuple[str, str | None]] = []
        self.body = BODY
        self.release = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is part of the test."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests_seen.append((self.path, wanted))
        path, n_before = urllib.parse.urlsplit(self.path).path, len(self.server.requests_seen) - 1
        plan = path.split("/")[1]
        if plan == "redirect":
            return self.answer(302, b"", {"Location": "/whole/file"})
        if plan == "missing":
            return self.answer(404, b"<html>no</html>", {"Content-Type": "text/html"})
        if plan == "busy" and n_before == 0:
            return self.answer(503, b"")
        if plan == "page":
            page = b"<html><title>Quota exceeded</title><p class='x'></html>"
            return self.answer(200, page, {"Content-Type": "text/html; charset=utf-8"})
        if plan == "disguised":
            return self.answer(
                200, b"\n<!DOCTYPE html><title>Sign in</title>", {"Content-Type": "application/octet-stream"}
            )
        if plan == "drive":
            page = CONFIRM_PAGE.format(action=f"{self.server.address}/whole/confirmed").encode()
            return self.answer(200, page, {"Content-Type": "text/html"})
        start = int(wanted[6:-1]) if wanted and plan not in ("norange",) else 0
        rest = self.server.body[start:]
        headers = {"Content-Length": str(len(rest)), "ETag": '"1"'}
        if plan == "changing":
            headers["ETag"] = f'"{n_before}"'
            if self.headers.get("If-Range") not in (None, headers["ETag"]):
                start, rest = 0, self.server.body
                headers["Content-Length"] = str(len(rest))
        if plan == "careless":  # sends the rest of another file, whatever If-Range says
            headers["ETag"] = f'"{n_before}"'
        if plan == "forgetful" and n_before:
            del headers["ETag"]
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(self.server.body) - 1}/{len(self.server.body)}"
        stop_once = ("cut", "norange", "stall", "changing", "careless", "forgetful")
        stops = (plan in stop_once and n_before == 0) or plan in ("always-cut", "hang")
        self.answer(206 if start else 200, rest[: len(rest) // 2] if stops else rest, headers)
        if plan in ("stall", "hang") and stops:
            self.server.release.wait(30)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        self.close_connection = True


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "PAUSE", 0)
    monkeypatch.setattr(downloading, "RETRIES", 2)
    monkeypatch.setattr(downloading, "STALL_TIMEOUT", 0.3)


def names_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize(
    ("plan", "n_requests"),
    [
        ("whole", 1),
        ("redirect", 2),
        ("cut", 2),
        ("norange", 2),
        ("changing", 2),
        ("careless", 3),
        ("forgetful", 3),
        ("busy", 2),
        ("drive", 2),
        ("stall", 2),
    ],
)
def test_arrives_whole(server: Server, tmp_path: Path, plan: str, n_requests: int) -> None:
    seen: list[tuple[int, int | None]] = []
    url = f"{server.address}/{plan}/file"
    download(url, tmp_path / "model.pt", on_progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "model.pt").read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY))
    assert len(server.requests_seen) == n_requests
    assert names_in(tmp_path) == ["model.pt"]


def test_a_cut_download_asks_only_for_the_rest(server: Server, tmp_path: Path) -> None:
    download(f"{server.address}/cut/file", tmp_path / "model.pt")
    (_, first), (_, second) = server.requests_seen
    assert first is None
    assert second is not None and 0 < int(second[6:-1]) <= len(BODY) // 2


def test_the_confirm_form_is_sent_with_all_its_fields(server: Server, tmp_path: Path) -> None:
    download(f"{server.address}/drive/uc?id=abc", tmp_path / "model.pt")
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(server.requests_seen[1][0]).query)
    assert query == {"id": ["abc"], "confirm": ["t"], "uuid": ["1-2&3"]}


@pytest.mark.parametrize(
    ("plan", "says"),
    [("missing", "404"), ("page", "Quota exceeded"), ("disguised", "web page"), ("always-cut", "ended")],
)
def test_what_is_not_the_file_raises_and_leaves_no_file(server: Server, tmp_path: Path, plan: str, says: str) -> None:
    with pytest.raises(DownloadError, match=says):
        download(f"{server.address}/{plan}/file", tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()
    if plan != "always-cut":
        assert names_in(tmp_path) == []
        assert len(server.requests_seen) == 1


def test_a_page_behind_the_confirm_form_raises(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "CONFIRM_PAGE", CONFIRM_PAGE.replace("{action}", "/page/quota"))
    with pytest.raises(DownloadError, match="Quota exceeded"):
        download(f"{server.address}/drive/uc?id=abc", tmp_path / "model.pt")


def test_a_wrong_digest_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="expected"):
        download(f"{server.address}/whole/file", tmp_path / "model.pt", expected_sha256="0" * 64)
    assert names_in(tmp_path) == []


def test_the_beginning_of_a_digest_is_enough(server: Server, tmp_path: Path) -> None:
    prefix = hashlib.sha256(BODY).hexdigest()[:8]
    download(f"{server.address}/whole/file", tmp_path / "model.pt", expected_sha256=prefix)


def test_halves_of_two_files_are_never_joined(server: Server, tmp_path: Path) -> None:
    # a server without tags whose file changed in between, at the same length
    half = len(BODY) // 2
    (tmp_path / ".model.pt.part").write_bytes(b"x" * half)
    note = f'{{"url": "{server.address}/whole/file", "tag": "", "total": {len(BODY)}}}'
    (tmp_path / ".model.pt.part.json").write_text(note)
    digest = hashlib.sha256(BODY).hexdigest()
    download(f"{server.address}/whole/file", tmp_path / "model.pt", expected_sha256=digest)
    assert (tmp_path / "model.pt").read_bytes() == BODY
    assert [wanted for _, wanted in server.requests_seen] == [f"bytes={half}-", None]


def test_two_downloads_into_one_file_never_give_a_wrong_one(server: Server, tmp_path: Path) -> None:
    """As on a file system without locks: another job appends to the same file meanwhile."""
    part = tmp_path / ".file.part"
    n_written = []

    def other(done: int, total: int | None) -> None:
        if not n_written:
            n_written.append(part.write_bytes(part.read_bytes() + b"other") if part.exists() else 0)

    download(f"{server.address}/whole/file", tmp_path / "file", on_progress=other)
    assert n_written[0] > 0
    assert (tmp_path / "file").read_bytes() == BODY


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="no connection"):
        download("http://127.0.0.1:1/file", tmp_path / "model.pt")
    with pytest.raises(DownloadError):
        download("nonsense://file", tmp_path / "model.pt")


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        download(f"{server.address}/whole/file", tmp_path / "file" / "model.pt")


def test_killed_in_the_middle_then_again(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "model.pt"
    code = (
        "import sys, pathlib; from meansparse_cli.models.download import download;"
        "download(sys.argv[1], pathlib.Path(sys.argv[2]))"
    )
    url = f"{server.address}/hang/file"
    process = subprocess.Popen([sys.executable, "-c", code, url, str(target)])
    part = tmp_path / ".model.pt.part"
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    server.release.set()
    assert not target.exists()
    have = part.stat().st_size
    assert 0 < have < len(BODY)
    # the same address, now from a server that behaves
    note = tmp_path / ".model.pt.part.json"
    write_json(note, (begun := read_json(note)) | {"url": begun["url"].replace("/hang/", "/whole/")})
    download(f"{server.address}/whole/file", target)
    assert target.read_bytes() == BODY
    assert server.requests_seen[-1][1] == f"bytes={have}-"
    assert names_in(tmp_path) == ["model.pt"]
