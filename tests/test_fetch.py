"""The cache: what enters it, what is trusted in it, and what a user is told when the network fails."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from meansparse_cli.errors import CheckpointError, ConfigError, DownloadError, StorageError
from meansparse_cli.files import sha256_of
from meansparse_cli.models import zoo
from meansparse_cli.models.fetch import cache_folder, fetch_weights
from meansparse_cli.models.names import WeightFile
from meansparse_cli.models.source import ModelSource, load_model

SOURCE = ModelSource("Hendrycks2020AugMix_WRN", "zoo", "cifar10", "corruptions")
FETCH_COMMAND = "meansparse fetch --model Hendrycks2020AugMix_WRN --threat corruptions --from-file FILE"


class Custom:
    """Something a checkpoint should not hold."""


class Server(ThreadingHTTPServer):
    """Answers every request with ``body``; with ``hangs`` it sends a third of it and waits."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.content_type, self.hangs, self.n_requests = b"", "application/octet-stream", False, 0
        self.release = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hung up is part of the test."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        server.n_requests += 1
        start = int(self.headers.get("Range", "bytes=0-")[6:-1])
        rest = server.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Type", server.content_type)
        self.send_header("Content-Length", str(len(rest)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        self.end_headers()
        self.wfile.write(rest[: len(rest) // 3] if server.hangs else rest)
        if server.hangs:
            self.wfile.flush()
            server.release.wait(60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "weights.pt"
    state = zoo.build_zoo_model(SOURCE.entry).state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    return path


@pytest.fixture
def server(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Google Drive, as far as our code can tell."""
    with Server() as server:
        server.body = checkpoint.read_bytes()
        monkeypatch.setattr(zoo, "GOOGLE_DRIVE_URL", f"http://127.0.0.1:{server.server_port}/uc?id=")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


def visible(cache: Path) -> list[str]:
    return sorted(p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_a_second_fetch_downloads_nothing(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    (first,) = fetch_weights(SOURCE, cache=tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    (second,) = fetch_weights(SOURCE, cache=tmp_path)
    assert first == second
    assert server.n_requests == 1
    assert seen[-1] == (len(server.body), len(server.body))
    assert first.path == tmp_path / "cifar10/corruptions/Hendrycks2020AugMix_WRN.pt"
    assert first.path.read_bytes() == server.body
    record = yaml.safe_load(first.path.with_name(f"{first.path.name}.yaml").read_text())
    assert record == {"size": len(server.body), "sha256": sha256_of(first.path), "origin": first.origin}
    assert first.origin.startswith("http://127.0.0.1")
    load_model(SOURCE, first.path)
    assert len(visible(tmp_path)) == 2


@pytest.mark.parametrize("spoil", ["half", "changed", "html", "gone", "half without record"])
def test_a_spoilt_file_is_fetched_again(server: Server, tmp_path: Path, spoil: str) -> None:
    (first,) = fetch_weights(SOURCE, cache=tmp_path)
    data = bytearray(server.body)
    if spoil == "changed":
        data[len(data) // 2] ^= 1
        first.path.write_bytes(data)
    elif spoil == "html":
        first.path.write_text("<!DOCTYPE html>")
    elif spoil == "gone":
        first.path.unlink()
    else:
        first.path.write_bytes(data[: len(data) // 2])
    if "without record" in spoil:
        first.path.with_name(f"{first.path.name}.yaml").unlink()
    assert fetch_weights(SOURCE, cache=tmp_path) == (first,)
    assert first.path.read_bytes() == server.body
    assert server.n_requests == 2


def test_a_file_put_there_by_hand_is_taken_if_it_loads(server: Server, checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "cifar10/corruptions/Hendrycks2020AugMix_WRN.pt"
    target.parent.mkdir(parents=True)
    target.write_bytes(checkpoint.read_bytes())
    assert [f.origin for f in fetch_weights(SOURCE, cache=tmp_path)] == ["found in the cache"]
    assert server.n_requests == 0


def test_a_page_instead_of_weights_says_what_to_do_by_hand(server: Server, tmp_path: Path) -> None:
    server.body, server.content_type = b"<html><title>Quota exceeded</title></html>", "text/html"
    with pytest.raises(DownloadError, match="Quota exceeded") as raised:
        fetch_weights(SOURCE, cache=tmp_path)
    assert raised.value.hint is not None and FETCH_COMMAND in raised.value.hint
    assert zoo.zoo_source(SOURCE.entry)[0].origin in raised.value.hint
    assert visible(tmp_path) == []


def test_anothers_weights_and_damaged_ones_are_not_kept(server: Server, tmp_path: Path) -> None:
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    damaged = bytearray(server.body)
    damaged[len(damaged) // 2] ^= 1
    for body, says in [((tmp_path / "other.pt").read_bytes(), "another model"), (bytes(damaged), "damaged")]:
        server.body = body
        with pytest.raises(DownloadError, match=says):
            fetch_weights(SOURCE, cache=tmp_path / "cache")
        assert visible(tmp_path / "cache") == []


def test_pickled_code_waits_for_the_flag_and_is_not_downloaded_twice(server: Server, tmp_path: Path) -> None:
    state = zoo.build_zoo_model(SOURCE.entry).state_dict()
    torch.save({"state_dict": state, "config": Custom()}, tmp_path / "code.pt")
    server.body = (tmp_path / "code.pt").read_bytes()
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        fetch_weights(SOURCE, cache=tmp_path / "cache")
    assert not (tmp_path / "cache/cifar10/corruptions/Hendrycks2020AugMix_WRN.pt").exists()
    fetch_weights(SOURCE, cache=tmp_path / "cache", allow_pickle=True)
    assert server.n_requests == 1
    assert len(visible(tmp_path / "cache")) == 2


def test_from_file_is_checked_before_it_is_taken(server: Server, checkpoint: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.pt"
    torch.save({"fc.weight": torch.zeros(1)}, bad)
    with pytest.raises(CheckpointError, match="another model"):
        fetch_weights(SOURCE, cache=tmp_path / "cache", from_file=bad)
    assert visible(tmp_path / "cache") == []
    (taken,) = fetch_weights(SOURCE, cache=tmp_path / "cache", from_file=checkpoint)
    assert taken.origin == str(checkpoint.resolve())
    assert fetch_weights(SOURCE, cache=tmp_path / "cache") == (taken,)
    with pytest.raises(CheckpointError):
        fetch_weights(SOURCE, cache=tmp_path / "cache", from_file=bad)
    assert fetch_weights(SOURCE, cache=tmp_path / "cache") == (taken,)  # a refused file does not cost the old one
    assert server.n_requests == 0


def test_what_a_killed_import_left_half_written_leaves_the_cache(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cifar10" / "corruptions"
    folder.mkdir(parents=True)
    half, other = folder / f".{SOURCE.name}.pt.4711-0badcafe.part", folder / ".Another.pt.4711-0badcafe.part"
    begun = folder / f".{SOURCE.name}.pt.unchecked.part"  # a download, which goes on
    for file in (half, other, begun):
        file.write_bytes(b"PK half")
    fetch_weights(SOURCE, cache=tmp_path, from_file=checkpoint)
    assert (half.exists(), other.exists(), begun.exists()) == (False, True, True)


def test_from_file_replaces_what_another_format_left(server: Server, checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    fetch_weights(SOURCE, cache=tmp_path, from_file=checkpoint)
    save_file(zoo.build_zoo_model(SOURCE.entry).state_dict(), tmp_path / "mine.safetensors")
    (taken,) = fetch_weights(SOURCE, cache=tmp_path, from_file=tmp_path / "mine.safetensors")
    assert fetch_weights(SOURCE, cache=tmp_path) == (taken,)
    assert taken.path.suffix == ".safetensors"


def test_an_ensembles_files_are_all_fetched(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pair(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.models = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])

    source = ModelSource("Chen2020Adversarial", "zoo", "cifar10", "Linf")
    files = tuple(WeightFile(f"Chen2020Adversarial.pt_m{i}.pt", f"{zoo.GOOGLE_DRIVE_URL}{i}") for i in range(2))
    monkeypatch.setattr(zoo, "zoo_source", lambda entry: files)
    monkeypatch.setattr(zoo, "build_zoo_model", lambda entry: Pair())
    torch.save({"state_dict": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "member.pt")
    server.body = (tmp_path / "member.pt").read_bytes()
    fetched = fetch_weights(source, cache=tmp_path / "cache")
    assert [f.path.name for f in fetched] == [f.file_name for f in files]
    assert fetch_weights(source, cache=tmp_path / "cache") == fetched
    assert server.n_requests == 2
    assert load_model(source, fetched[0].path) is not None
    fetched[1].path.write_bytes(b"half")
    assert fetch_weights(source, cache=tmp_path / "cache") == fetched
    assert server.n_requests == 3


KILLED = """
import sys
from pathlib import Path
from meansparse_cli.models import zoo
from meansparse_cli.models.fetch import fetch_weights
from meansparse_cli.models.source import ModelSource
zoo.GOOGLE_DRIVE_URL = sys.argv[1]
fetch_weights(ModelSource(*sys.argv[3:]), cache=Path(sys.argv[2]))
"""


def test_killed_in_the_middle_then_again(server: Server, tmp_path: Path) -> None:
    server.hangs = True
    what = (SOURCE.name, SOURCE.kind, SOURCE.dataset, SOURCE.threat)
    process = subprocess.Popen([sys.executable, "-c", KILLED, zoo.GOOGLE_DRIVE_URL, str(tmp_path), *what])
    folder = tmp_path / "cifar10/corruptions"
    while process.poll() is None and not any(p.stat().st_size for p in folder.glob(".*.unchecked.part")):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / f"{SOURCE.name}.pt").exists()
    server.hangs = False
    server.release.set()
    (fetched,) = fetch_weights(SOURCE, cache=tmp_path)
    assert fetched.path.read_bytes() == server.body
    assert len(visible(tmp_path)) == 2


def test_weights_are_used_where_they_lie(checkpoint: Path, tmp_path: Path) -> None:
    (fetched,) = fetch_weights(SOURCE, cache=tmp_path, weights=checkpoint)
    assert (fetched.path, fetched.sha256) == (checkpoint, sha256_of(checkpoint))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="no weights at"):
        fetch_weights(SOURCE, cache=tmp_path, weights=tmp_path / "absent.pt")


def test_models_that_need_no_cache(tmp_path: Path) -> None:
    factory = ModelSource("nets:make", "factory", "cifar10", "Linf")
    assert fetch_weights(factory, cache=tmp_path) == ()
    with pytest.raises(ConfigError, match="--weights FILE"):
        fetch_weights(factory, cache=tmp_path, from_file=tmp_path / "weights.pt")


def test_timm_weights_are_kept_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    n_built = []

    def create_model(name: str, pretrained: bool) -> torch.nn.Module:
        n_built.append(pretrained)
        return torch.nn.Linear(3, 2)

    monkeypatch.setattr(timm, "create_model", create_model)
    source = ModelSource("timm:resnet10t.c3_in1k", "timm", "imagenet", "Linf")
    (first,) = fetch_weights(source, cache=tmp_path)
    assert fetch_weights(source, cache=tmp_path) == (first,)
    assert n_built == [True]
    assert load_model(source, first.path) is not None
    assert n_built == [True, False]


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("MEANSPARSE_CACHE", raising=False)
    assert cache_folder() == tmp_path / "meansparse"
    monkeypatch.setenv("MEANSPARSE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    (tmp_path / "mine").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="cannot write"):
        fetch_weights(SOURCE, cache=cache_folder())
