"""An object store that can be unreachable for a while, as if it were down."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

from d2v_composer.benchmarks.data import ObjectStore

HOST = "127.0.0.1"


class Forwarder(BaseRequestHandler):
    """Copies bytes between a client and the server behind the gate."""

    server: "Gate"  # pyright: ignore[reportIncompatibleVariableOverride]

    def handle(self) -> None:
        with suppress(OSError), socket.create_connection((HOST, self.server.port_behind)) as behind:
            answers = threading.Thread(target=copy, args=(behind, self.request), daemon=True)
            answers.start()
            copy(self.request, behind)
            answers.join()


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

    def __init__(self, port: int, port_behind: int) -> None:
        super().__init__((HOST, port), Forwarder)
        self.port_behind = port_behind
        self.clients: set[Any] = set()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.clients.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.clients.discard(request)
        super().shutdown_request(request)

    def close(self) -> None:
        """End all connections, and refuse new ones."""
        self.shutdown()
        for each in (self.socket, *self.clients):  # a forked process may have inherited them
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
        self.server_close()


class GatedStore(ObjectStore):
    """An object store behind a gate. The tests of a process share one, with a bucket for each file."""

    gate: Gate | None = None

    def create_bucket_of_images(self, bucket: str, folder: Path) -> None:
        """Create a bucket with a folder's files under ``images/``."""
        self.create_bucket(bucket)
        client = self.client()
        for file in folder.iterdir():
            client.upload_file(str(file), bucket, f"images/{file.name}")

    @property
    def endpoint(self) -> str:
        return super().endpoint if self.gate is None else f"http://{HOST}:{self.gate.server_address[1]}"

    def start(self) -> None:
        super().start()
        self.gate = Gate(0, self.ports["s3"])

    def __exit__(self, *error: object) -> None:
        if self.gate is not None:
            self.gate.close()
        super().__exit__(*error)

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """End all connections and refuse new ones while the block lasts, as if the server were down."""
        assert self.gate is not None
        self.gate.close()
        try:
            yield
        finally:
            self.gate = Gate(self.gate.server_address[1], self.ports["s3"])
