"""S3 downloads from slow stores succeed; stalled and broken ones fail with the right error."""

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

from d2v_composer.system import retry as retry_module
from d2v_composer.system.fetch import transfer
from helpers import serving, time_limit


class Sending(NamedTuple):
    """Parameters with which the server sends a file."""

    bytes_at_a_time: int = 1 << 20
    pause: float = 0
    """Seconds before each part."""
    ends_after: int | None = None
    """Bytes sent of those in the header; ``None``: all."""


class Server(ThreadingHTTPServer):
    """Serves GET /bucket/key like S3, without authentication."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.sendings: dict[str, Sending] = {}
        """Key → how its file is sent; others are sent at once."""
        self.requests: list[str] = []
        self.num_connections = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def setup(self) -> None:
        super().setup()
        self.server.num_connections += 1

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        key = self.path.split("?")[0].removeprefix("/bucket/")
        self.server.requests.append(key)
        content = self.server.files.get(key)
        self.send_response(404 if content is None else 200)
        content = b"<Error><Code>NoSuchKey</Code></Error>" if content is None else content
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        sending = self.server.sendings.get(key, Sending())
        sent, step = content[: sending.ends_after], sending.bytes_at_a_time
        try:
            for start in range(0, len(sent), step):
                time.sleep(sending.pause)
                self.wfile.write(sent[start : start + step])
        except OSError:  # the client disconnected
            self.close_connection = True
        self.close_connection |= sending.ends_after is not None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(Server()) as server:
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "x")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield server


FILE = bytes(range(256)) * 80  # 20 kB
DRIPPING = Sending(bytes_at_a_time=1, pause=0.05)


def test_a_slow_but_steady_download_may_take_ten_times_the_timeout(server: Server, tmp_path: Path) -> None:
    server.files["a/b"], server.sendings["a/b"] = FILE, Sending(bytes_at_a_time=1024, pause=0.05)
    begin = time.monotonic()
    transfer("s3://bucket/a/b", tmp_path / "file", 0.1)
    assert time.monotonic() - begin > 1
    assert (tmp_path / "file").read_bytes() == FILE


def test_a_stalled_download_times_out(server: Server, tmp_path: Path) -> None:
    server.files["a"], server.sendings["a"] = FILE, DRIPPING
    with pytest.raises(TimeoutError, match=r"too slow: \d bytes in 0 s"), time_limit(20):
        transfer("s3://bucket/a", tmp_path / "file", 0.3)


def test_a_broken_connection_is_not_a_lasting_fault(server: Server, tmp_path: Path) -> None:
    server.files["a"], server.sendings["a"] = FILE, Sending(ends_after=7000)
    with pytest.raises(ConnectionError, match=r"truncated after 7000 of 20480 bytes") as caught:
        transfer("s3://bucket/a", tmp_path / "file", 5)
    assert not retry_module.is_lasting(caught.value)


def test_a_missing_file_is_an_error(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/a#b\?c: not found"):
        transfer("s3://bucket/a#b?c", tmp_path / "file", 5)
    assert server.requests == ["a%23b%3Fc"]


def test_each_file_takes_one_request_on_one_connection(server: Server, tmp_path: Path) -> None:
    for i in range(5):
        server.files[f"{i}"] = FILE * 1000  # 20 MB
        transfer(f"s3://bucket/{i}", tmp_path / "file", 5)
        assert (tmp_path / "file").read_bytes() == FILE * 1000
    assert server.requests == ["0", "1", "2", "3", "4"]
    assert server.num_connections == 1
