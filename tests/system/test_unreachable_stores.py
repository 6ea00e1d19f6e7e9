"""Unreachable stores and hosts are noticed soon, and not mistaken for missing files."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from botocore.exceptions import ConnectTimeoutError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from d2v_composer.system import fetch
from d2v_composer.system.fetch import transfer
from d2v_composer.system.retry import CONNECT_SECONDS, is_lasting, is_missing
from helpers import time_limit


@pytest.fixture
def silent_host() -> Iterator[str]:
    """A host that accepts no connection, as behind a firewall, because its queue is full."""
    with socket.socket() as host:
        host.bind(("127.0.0.1", 0))
        host.listen(0)
        waiting = [socket.socket() for _ in range(8)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(host.getsockname())
        yield f"127.0.0.1:{host.getsockname()[1]}"
        for each in waiting:
            each.close()


@pytest.fixture(autouse=True)
def short_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CONNECT_SECONDS <= 10
    monkeypatch.setattr(fetch, "CONNECT_SECONDS", 0.3)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_an_unreachable_web_host_times_out(silent_host: str, tmp_path: Path) -> None:
    with pytest.raises(requests.ConnectTimeout), time_limit(60):
        transfer(f"http://{silent_host}/base.pt", tmp_path / "base.pt", timeout=600)


def test_an_unreachable_store_times_out(silent_host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", f"http://{silent_host}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, "x")
    with pytest.raises(ConnectTimeoutError), time_limit(60):
        transfer("s3://bucket/base.pt", tmp_path / "base.pt", timeout=600)


def test_an_unreachable_hugging_face_is_not_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's own attempts
    with pytest.raises(LocalEntryNotFoundError) as caught:
        hf_hub_download("someone/images", "index.json", cache_dir=tmp_path, endpoint="http://127.0.0.1:9")
    assert isinstance(caught.value, FileNotFoundError)
    assert not is_lasting(caught.value)
    assert not is_missing(caught.value)


@pytest.mark.parametrize(
    ("kind", "status", "lasting", "missing"),
    [
        (EntryNotFoundError, 404, True, True),
        (RepositoryNotFoundError, 401, True, False),
        (HfHubHTTPError, 429, False, False),
    ],
)
def test_hugging_faces_errors_are_classified(
    kind: type[HfHubHTTPError], status: int, lasting: bool, missing: bool
) -> None:
    response = requests.Response()
    response.status_code = status
    error = kind("refused", response=response)
    assert (is_lasting(error), is_missing(error)) == (lasting, missing)


def test_offline_mode_of_hugging_face_is_a_lasting_fault() -> None:
    error = LocalEntryNotFoundError("offline mode is enabled")
    error.__cause__ = OfflineModeIsEnabled("offline")
    assert is_lasting(error)
