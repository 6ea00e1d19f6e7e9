"""Files come whole from slow, broken and unreachable servers, or with the right error; signatures are not stored."""

import hashlib
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest
import requests
from botocore.exceptions import ConnectTimeoutError
from streaming.base.storage import CloudDownloader

from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.config.reference import load_any
from d2v_composer.system import fetch as fetch_module
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import CONNECT_SECONDS, cache_folder, fetch, is_lasting, transfer
from helpers import GOLDEN, time_limit

FILE = bytes(range(256)) * 80  # 20 kB
SIGNED = (
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIASECRET%2F20260101%2Fus-east-1%2Fs3%2Faws4_request"
    "&X-Amz-Expires=3600&X-Amz-SignedHeaders=host&X-Amz-Security-Token=" + "S" * 900
)


class Server(ThreadingHTTPServer):
    """Serves GET /bucket/key like S3, without authentication, but not to expired signatures."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root = f"http://127.0.0.1:{self.server_port}"
        self.files = {"base.pt": (GOLDEN / "tiny_base.pt").read_bytes(), "file": FILE}
        self.part, self.pause = 1 << 20, 0.0  # bytes at a time, and seconds before them
        self.ends_after: int | None = None  # bytes of those in the header
        self.status, self.versions = 200, True
        self.requests: list[str] = []

    def presigned(self, signature: str, more: str = "") -> str:
        return f"{self.root}/bucket/base.pt?{more}{SIGNED}&X-Amz-Signature={signature}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        key = self.path.split("?")[0].removeprefix("/bucket/")
        self.server.requests.append(key)
        if "expired" in self.path or self.server.status != 200:
            self.send_error(403 if "expired" in self.path else self.server.status)
            return
        content = self.server.files.get(key, b"<Error><Code>NoSuchKey</Code></Error>")
        self.send_response(200 if key in self.server.files else 404)
        self.send_header("Content-Length", str(len(content)))
        if self.server.versions:
            self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.end_headers()
        sent = content[: self.server.ends_after]
        with suppress(OSError):  # the client may have disconnected
            for start in range(0, len(sent), self.server.part):
                time.sleep(self.server.pause)
                self.wfile.write(sent[start : start + self.server.part])
        self.close_connection = len(sent) < len(content)


@pytest.fixture(autouse=True)
def variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("S3_ENDPOINT_URL", server.root)
        yield server
        server.shutdown()


def test_a_slow_but_steady_download_may_take_ten_times_the_timeout(server: Server, tmp_path: Path) -> None:
    server.part, server.pause = 1024, 0.05
    start = time.monotonic()
    transfer("s3://bucket/file", tmp_path / "file", 0.1)
    assert time.monotonic() - start > 1
    assert (tmp_path / "file").read_bytes() == FILE


def test_stalled_broken_and_missing_downloads_are_errors(server: Server, tmp_path: Path) -> None:
    server.part, server.pause = 1, 0.05
    with pytest.raises(TimeoutError, match=r"too slow: \d bytes in 0 s"), time_limit(20):
        transfer("s3://bucket/file", tmp_path / "file", 0.3)
    server.part, server.pause, server.ends_after = 1 << 20, 0, 7000
    with pytest.raises(ConnectionError, match=r"truncated after 7000 of 20480 bytes") as caught:
        transfer("s3://bucket/file", tmp_path / "file", 5)
    assert not is_lasting(caught.value)
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/a#b\?c: not found"):
        transfer("s3://bucket/a#b?c", tmp_path / "file", 5)
    assert server.requests[-1] == "a%23b%3Fc"


def test_a_presigned_teacher_is_cached_without_its_query(server: Server) -> None:
    """test_addresses.py and promise 25 show that no other file has the query."""
    path = fetch(server.presigned("first"))
    assert load_teacher(server.presigned("second")).provenance["source"] == "base.pt"
    assert fetch(f"{server.root}/bucket/base.pt") == path  # like an evaluation
    assert server.requests == ["base.pt"]
    assert sorted(file.name[17:] for file in cache_folder().iterdir()) == ["base.pt", "base.pt.lock", "base.pt.version"]
    assert fetch(server.presigned("first", "versionId=1&")) != path
    with pytest.raises(InputError, match=r"cannot be fetched \(403 Client Error") as caught:
        load_any(server.presigned("expired", "versionId=2&"))
    assert not [secret for secret in ("AKIASECRET", "SSSS", "X-Amz", "expired") if secret in str(caught.value)]


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_replaced_file_is_fetched_again(
    server: Server, scheme: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if an earlier call was killed between the two files of the cache; a cached file alone is named."""
    address = f"{server.root}/bucket/file" if scheme == "http" else "s3://bucket/file"
    path = fetch(address)
    assert fetch(address) == path
    assert server.requests == ["file"]  # a command asks once
    monkeypatch.setattr(fetch_module, "ASK_SECONDS", 0)
    inode = path.stat().st_ino
    assert fetch(address).stat().st_ino == inode
    server.files["file"] = FILE[::-1]
    with monkeypatch.context() as patch:
        patch.setattr(fetch_module, "write_atomically", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch(address)
    for content in (FILE, FILE[::-1]):
        server.files["file"] = content
        assert fetch(address).read_bytes() == content
    assert not caplog.records
    server.status = 503
    assert fetch(address).read_bytes() == FILE[::-1]
    [said] = caplog.messages
    problem = rf"{address} was not fetched \(.*503.*\)"
    assert re.match(rf"{problem}; using the cached copy, from [\d-]+; delete {path} to fetch", said)


def test_a_file_without_a_version_is_named(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fetch_module, "ASK_SECONDS", 0)
    server.versions = False
    address = f"{server.root}/bucket/file"
    fetch(address)
    assert not caplog.records
    server.files["file"] = FILE[::-1]
    path = fetch(address)
    assert path.read_bytes() == FILE
    [said] = caplog.messages
    assert "its server does not say whether the file has changed" in said
    assert f"delete {path}" in said
    path.unlink()
    assert fetch(address).read_bytes() == FILE[::-1]


@pytest.mark.parametrize(
    ("address", "asked"),
    [
        ("azure://container/a/f", "azure://-/container/a/f"),  # the downloader takes the first part for the account
        ("azure://account.blob.core.windows.net/container/f", "azure://account.blob.core.windows.net/container/f"),
        ("gs://bucket/a/f", "gs://bucket/a/f"),
    ],
)
def test_a_part_of_a_file_does_not_pass_as_the_file(
    address: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming's downloaders keep a file that is there; test_other_stores has real stores."""

    def download(remote: str, local: str, timeout: float) -> None:
        if not Path(local).exists():
            Path(local).write_text(remote)

    monkeypatch.setattr(CloudDownloader, "get", lambda remote: Mock(download=download))
    (path := tmp_path / "file").write_bytes(b"left by an attempt before")
    transfer(address, path, 1)
    assert path.read_text() == asked


def test_an_unreachable_host_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that accepts no connection, as behind a firewall, because its queue is full."""
    assert CONNECT_SECONDS <= 10
    monkeypatch.setattr(fetch_module, "CONNECT_SECONDS", 0.3)
    with socket.socket() as host:
        host.bind(("127.0.0.1", 0))
        host.listen(0)
        waiting = [socket.socket() for _ in range(8)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(host.getsockname())
        web = f"http://127.0.0.1:{host.getsockname()[1]}"
        monkeypatch.setenv("S3_ENDPOINT_URL", web)
        for address, error in ((f"{web}/f", requests.ConnectTimeout), ("s3://bucket/f", ConnectTimeoutError)):
            with pytest.raises(error), time_limit(60):
                transfer(address, tmp_path / "f", timeout=600)
        for client in waiting:
            client.close()
