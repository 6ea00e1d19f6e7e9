"""Signatures, logins and tokens in addresses are neither stored nor shown."""

import http.server
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from d2v_composer.builders.training import build_run_record
from d2v_composer.checkpoints.load import load_any, load_teacher
from d2v_composer.config.load import load_config
from d2v_composer.system import retry as retry_module
from d2v_composer.system.addresses import file_name, hide_all_secrets, hide_secrets, identity
from d2v_composer.system.command_line import explain
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import cache_folder, fetch
from d2v_composer.system.retry import retry
from helpers import GOLDEN, serving, small_run

SIGNED = (
    "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIASECRET%2F20260101%2Fus-east-1%2Fs3%2Faws4_request"
    "&X-Amz-Date=20260101T000000Z&X-Amz-Expires=3600&X-Amz-SignedHeaders=host&X-Amz-Security-Token=" + "S" * 900
)
SECRETS = ("AKIASECRET", "SSSS", "hunter2", "topsecret", "X-Amz", "first-signature", "second-signature")


class Server(http.server.ThreadingHTTPServer):
    """Serves one file to requests with a signature."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.num_requests = 0

    def address(self, signature: str, more: str = "") -> str:
        return f"http://127.0.0.1:{self.server_port}/models/base.pt?{more}{SIGNED}&X-Amz-Signature={signature}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        self.server.num_requests += 1
        if "expired" in self.path or "Signature" not in self.path:
            self.send_error(403)
            return
        content = (GOLDEN / "tiny_base.pt").read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Server()) as server:
        yield server


def test_a_presigned_teacher_is_cached_and_recorded_without_its_query(
    server: Server, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = load_teacher(server.address("first-signature"))
    assert teacher.provenance["source"] == "base.pt"
    assert fetch(server.address("second-signature")) == fetch(server.address("first-signature"))  # with a new signature
    assert server.num_requests == 1
    assert sorted(path.name[17:] for path in cache_folder().iterdir()) == ["base.pt", "base.pt.lock"]

    override = f"teacher.checkpoint={server.address('second-signature')}"
    monkeypatch.setattr("sys.argv", ["recipes/train.py", "yamls/quickstart.yaml", override, "seed=3"])
    config = load_config(small_run(small_data, small_data, override))
    record = build_run_record(config, (), teacher=teacher.provenance).record
    bare = server.address("").partition("?")[0]
    assert record["config"]["teacher"]["checkpoint"] == bare
    assert record["command"] == f"recipes/train.py yamls/quickstart.yaml teacher.checkpoint={bare} seed=3"
    assert not [secret for secret in SECRETS if secret in str(record)]
    assert fetch(bare) == fetch(server.address("first-signature"))  # like an evaluation


def test_an_expired_signature_is_not_shown(server: Server) -> None:
    with pytest.raises(InputError) as caught:
        load_any(server.address("expired"))
    assert "base.pt: cannot be fetched (403 Client Error: Forbidden for url: http://127.0.0.1" in str(caught.value)
    assert not [secret for secret in SECRETS if secret in str(caught.value)]


def test_another_version_is_another_file(server: Server) -> None:
    one, other = (fetch(server.address("first-signature", f"versionId={version}&")) for version in ("1", "2"))
    assert one != other
    assert server.num_requests == 2


def test_secrets_are_removed_from_text() -> None:
    for address, shown in (
        ("https://user:hunter2@host/base.pt#top", "https://host/base.pt"),
        ("https://host/base.pt?token=topsecret&versionId=3", "https://host/base.pt?versionId=3"),
        ("https://host/base.pt?Expires=1&Signature=topsecret&Key-Pair-Id=K", "https://host/base.pt"),
        ("https://a.blob.core.windows.net/c/f?sv=2022&sp=r&sig=topsecret", "https://a.blob.core.windows.net/c/f"),
        ("sftp://user:hunter2@host:22/data/train", "sftp://host:22/data/train"),
        ("oci://bucket@namespace/key", "oci://bucket@namespace/key"),
        ("/data/what?/file#1", "/data/what?/file#1"),
        ("cannot (https://u:hunter2@[::1]/f?sig=topsecret): 403", "cannot (https://[::1]/f 403"),
    ):
        assert hide_secrets(address) == shown
    nested = {"a": ['say "https://u:hunter2@host/f\\" é', 3, None], "b": {"c": "https://host/f?token=topsecret\n"}}
    assert hide_all_secrets(nested) == {"a": ['say "https://host/f\\" é', 3, None], "b": {"c": "https://host/f\n"}}


def test_identity_ignores_signatures_only() -> None:
    assert identity("https://u:p@host/get?sha=1&sig=2#x") == identity("https://host/get?sha=1&sig=3")
    assert identity("https://host/get?sha=1") != identity("https://host/get?sha=2")
    assert file_name("https://host/a/base.pt?token=topsecret") == "base.pt"
    assert file_name("/models/what?.pt") == "what?.pt"


def test_retries_are_logged_without_secrets(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "FIRST_PAUSE", 0.01)
    address = "https://user:hunter2@host/f?sig=topsecret"
    failures = iter([requests.ConnectionError(f"no answer of {address}")])

    def attempt() -> None:
        for failure in failures:
            raise failure

    with caplog.at_level(logging.WARNING):
        retry(attempt, address, timeout=5)
    assert "https://host/f: no answer of https://host/f; retrying" in caplog.text
    assert not [secret for secret in SECRETS if secret in caplog.text]


def test_a_commands_error_shows_no_secrets() -> None:
    status, [line] = explain(InputError("https://user:hunter2@host/f?token=topsecret: no such file"))
    assert (status, line) == (2, "error: https://host/f no such file")
