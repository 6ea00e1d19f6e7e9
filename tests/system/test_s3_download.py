"""Stores that are slow, hardly send anything, or break off."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils.data import DataLoader

from d2v_composer.data.augmentation import RandomResizedCropFlip
from d2v_composer.data.streaming_images import StreamingImages
from d2v_composer.data.verified_stream import ShardError
from d2v_composer.system import retry as retry_module
from d2v_composer.system.s3_download import S3Downloader
from helpers import time_limit

NUM_SAMPLES = 96


class Sending(NamedTuple):
    """How a file is sent."""

    bytes_at_a_time: int = 1 << 20
    pause: float = 0
    """Before each part, in seconds."""
    ends_after: int | None = None
    """Bytes, of those that the header promises."""


class Server(ThreadingHTTPServer):
    """GET of an S3 store: /bucket/key, by anybody."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.sendings: dict[str, Sending] = {}
        """Of a key; of others all at once."""
        self.requests: list[str] = []
        self.num_connections = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def setup(self) -> None:
        super().setup()
        self.server.num_connections += 1

    def log_message(self, format: str, *args: object) -> None:
        """Be silent."""

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
        except OSError:  # the client went away
            self.close_connection = True
        self.close_connection |= sending.ends_after is not None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        monkeypatch.setenv("S3_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "x")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield server
        server.shutdown()


FILE = bytes(range(256)) * 80  # 20 kB
DRIPPING = Sending(bytes_at_a_time=1, pause=0.05)


def test_a_steady_link_may_be_slow(server: Server, tmp_path: Path) -> None:
    """Ten times its patience."""
    server.files["a/b"], server.sendings["a/b"] = FILE, Sending(bytes_at_a_time=1024, pause=0.1)
    begin = time.monotonic()
    S3Downloader(patience=0.2).download("s3://bucket/a/b", tmp_path / "file")
    assert time.monotonic() - begin > 2
    assert (tmp_path / "file").read_bytes() == FILE


def test_a_body_that_drips_is_given_up(server: Server, tmp_path: Path) -> None:
    server.files["a"], server.sendings["a"] = FILE, DRIPPING
    with pytest.raises(TimeoutError, match=r"given up: \d bytes came in 0 s"), time_limit(5):
        S3Downloader(patience=0.3).download("s3://bucket/a", tmp_path / "file")


def test_a_download_is_stopped(server: Server, tmp_path: Path) -> None:
    server.files["a"], server.sendings["a"] = FILE, DRIPPING
    stop = threading.Event()
    stop.set()
    with pytest.raises(InterruptedError), time_limit(5):
        S3Downloader(patience=60).download("s3://bucket/a", tmp_path / "file", stop)


def test_a_body_that_breaks_off_is_no_lasting_fault(server: Server, tmp_path: Path) -> None:
    server.files["a"], server.sendings["a"] = FILE, Sending(ends_after=7000)
    with pytest.raises(ConnectionError, match=r"broke off after 7000 of 20480 bytes") as caught:
        S3Downloader(patience=5).download("s3://bucket/a", tmp_path / "file")
    assert not retry_module.is_lasting(caught.value)


def test_a_file_that_is_not_there(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"s3://bucket/a#b\?c: not found"):
        S3Downloader(patience=5).download("s3://bucket/a#b?c", tmp_path / "file")
    assert server.requests == ["a%23b%3Fc"]


def test_files_come_in_one_request_each_on_one_connection(server: Server, tmp_path: Path) -> None:
    downloader = S3Downloader(patience=5)
    for i in range(5):
        server.files[f"{i}"] = FILE * 1000  # 20 MB
        downloader.download(f"s3://bucket/{i}", tmp_path / "file")
        assert (tmp_path / "file").read_bytes() == FILE * 1000
    assert server.requests == ["0", "1", "2", "3", "4"]
    assert server.num_connections == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_ends_where_a_shard_drips(
    server: Server, many_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """With an error that names the shard, after as long as the data set is patient and one request may take."""
    monkeypatch.setattr(retry_module, "FIRST_PAUSE", 0.1)
    server.files = {f"images/{file.name}": file.read_bytes() for file in many_shards.iterdir()}
    server.sendings["images/shard.00007.mds"] = DRIPPING
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "index.json").write_bytes((many_shards / "index.json").read_bytes())
    dataset = StreamingImages(
        local=cache,
        remote="s3://bucket/images",
        batch_size=16,
        transform=RandomResizedCropFlip(24),
        seed=5,
        timeout=1,
    )
    batches = iter(DataLoader(dataset, 16, num_workers=workers))
    with (
        pytest.raises(
            ShardError, match=r"s3://bucket/images/shard\.00007\.mds: the shard cannot be fetched: given up: \d+ bytes"
        ),
        time_limit(10),
    ):
        list(batches)
    if workers:
        batches._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]
    assert server.requests.count("images/shard.00007.mds") > 1  # tried again
    assert not list(cache.glob("shard.00007*"))
