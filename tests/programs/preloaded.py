"""Run Python programs in forks of one process that has imported torch, Composer and this package.

A start takes milliseconds instead of the five seconds of those imports. Each program is still a process of its own. It
has its own pid, session, environment, directory, output and exit status. Its threads, exit handlers and output end like
any interpreter's; only its modules are not torn down, which takes half a second.

All test processes share one server. It imports when the first of them connects, and ends with the process that started
it.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

REQUEST_BYTES, ANSWER_BYTES = 1 << 20, 1 << 8
START_SECONDS = 300
STDIN = 0
ADDRESS = "PRELOADED_PYTHON"
"""The variable with the server's name among Linux's abstract sockets, which leave no file behind."""


class Program:
    """A program that was started, used as :class:`subprocess.Popen`; its output, as text, can be read at any time."""

    def __init__(self, server: "PreloadedPython", arguments: list[str], pid: int, outputs: Sequence[int]) -> None:
        self.arguments = arguments
        self.pid = pid
        self._server = server
        self._outputs = outputs
        for descriptor in outputs:
            weakref.finalize(self, os.close, descriptor)

    @property
    def stdout(self) -> str:
        return self._text(0)

    @property
    def stderr(self) -> str:
        return self._text(1)

    def _text(self, number: int) -> str:
        descriptor = self._outputs[number]
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode()

    def poll(self) -> int | None:
        """Return the exit status, or None while the program runs."""
        return self._server.status_of(self.pid, timeout=0)

    def wait(self, timeout: float) -> int:
        """Return the exit status.

        Raises:
            subprocess.TimeoutExpired: The program still runs.
        """
        status = self._server.status_of(self.pid, timeout)
        if status is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout, self.stdout, self.stderr)
        return status

    @property
    def peak_megabytes(self) -> int:
        """The largest resident memory of a program that has ended."""
        return self._server.megabytes[self.pid]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_server() -> subprocess.Popen[bytes]:
    """Start the server of this process and its children; it ends when its input is closed."""
    os.environ[ADDRESS] = f"preloaded-{os.getpid()}"
    # OpenMP and OpenBLAS read it when they load; one thread also means that no thread exists when the server forks.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"\0{os.environ[ADDRESS]}")
        listener.listen()
        command, passed = [sys.executable, __file__, str(listener.fileno())], [listener.fileno()]
        return subprocess.Popen(
            command, env=environment, pass_fds=passed, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )


class PreloadedPython:
    """Starts programs; the server ends with the process that started it, and none of the programs does."""

    def __init__(self) -> None:
        self._server = None if ADDRESS in os.environ else start_server()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(f"\0{os.environ[ADDRESS]}")
        self._statuses: dict[int, int] = {}
        self.megabytes: dict[int, int] = {}
        """pid → the program's peak memory, which includes the imports' 600 MB."""

    def start(self, arguments: list[str], cwd: Path, environment: dict[str, str], stdin: int | None = None) -> Program:
        """Start ``python ARGUMENTS``; with an input, its outputs are those of this process."""
        outputs = [os.memfd_create(name) for name in ("stdout", "stderr")] if stdin is None else []
        request = json.dumps({"arguments": arguments, "cwd": str(cwd), "environment": environment}).encode()
        socket.send_fds(self._socket, [request], outputs if stdin is None else [stdin, 1, 2])
        while (message := self._receive(START_SECONDS)) is not None:
            if message["status"] is None:
                return Program(self, arguments, message["pid"], outputs)
        raise RuntimeError(f"no program started within {START_SECONDS} s")

    def status_of(self, pid: int, timeout: float) -> int | None:
        """Return the exit status of a program, or None if it still runs after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while pid not in self._statuses and self._receive(max(0.0, deadline - time.monotonic())) is not None:
            pass
        return self._statuses.get(pid)

    def _receive(self, timeout: float) -> dict[str, Any] | None:
        if not select.select([self._socket], [], [], timeout)[0]:
            return None
        message = json.loads(self._socket.recv(ANSWER_BYTES) or '{"pid": 0, "status": null}')
        if message["pid"] == 0:
            raise RuntimeError("the server of preloaded programs has ended")
        if message["status"] is None:  # started, perhaps under the number of a program that has ended
            self._statuses.pop(message["pid"], None)
        else:
            self._statuses[message["pid"]] = message["status"]
            self.megabytes[message["pid"]] = message["megabytes"]
        return message


def serve(listener: socket.socket, first: socket.socket) -> dict[str, Any]:
    """Fork for each request, and report each exit. Return the request in the child; the server never returns."""
    connections = {first.fileno(): first}
    running: dict[int, tuple[int, socket.socket]] = {}  # its pidfd → its pid, and the connection that asked for it
    while True:
        for ready in select.select([STDIN, listener.fileno(), *connections, *running], [], [])[0]:
            if ready == STDIN:  # closed
                os._exit(0)
            elif ready == listener.fileno():
                connection, _ = listener.accept()
                connections[connection.fileno()] = connection
            elif ready in running:
                pid, connection = running.pop(ready)
                os.close(ready)
                _, status, usage = os.wait4(pid, 0)
                answer(connection, pid, os.waitstatus_to_exitcode(status), usage.ru_maxrss >> 10)
            else:
                message, descriptors, _, _ = socket.recv_fds(connections[ready], REQUEST_BYTES, 3)
                if not message:  # this test process has ended
                    connections.pop(ready).close()
                    continue
                pid = os.fork()
                if pid == 0:
                    for endpoint in (listener, *connections.values()):
                        endpoint.close()
                    for pidfd in running:
                        os.close(pidfd)
                    take_streams(descriptors)
                    return json.loads(message)
                for descriptor in descriptors:
                    os.close(descriptor)
                running[os.pidfd_open(pid)] = pid, connections[ready]
                answer(connections[ready], pid, None)


def take_streams(descriptors: Sequence[int]) -> None:
    """Use descriptors as the streams of this process; of two, as its outputs, with nothing as its input."""
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), STDIN)
    for target, descriptor in enumerate(descriptors, start=3 - len(descriptors)):
        os.dup2(descriptor, target)
        os.close(descriptor)


def answer(connection: socket.socket, pid: int, status: int | None, megabytes: int = 0) -> None:
    with suppress(OSError):  # the test process has ended
        connection.send(json.dumps({"pid": pid, "status": status, "megabytes": megabytes}).encode())


def run(request: dict[str, Any]) -> None:
    """Become the requested program."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.setsid()
    os.chdir(request["cwd"])
    tempfile.tempdir = None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    status: object = None
    try:
        execute(request["arguments"])
    except SystemExit as ended:
        status = ended.code
    if status is None or isinstance(status, int):
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status or 0)
    sys.exit(status)  # pyright: ignore[reportArgumentType]


def know_the_machine() -> None:
    """Tell Composer what it asks for: another process, for a second, and at each checkpoint the list of its files."""
    collect_env: Any = importlib.import_module("composer.utils.collect_env")
    collect_env.get_cpu_model = lambda: "CPU"
    collect_env.get_composer_commit_hash = lambda: None


def execute(arguments: list[str]) -> None:
    """Run ``python ARGUMENTS``."""
    first, *rest = arguments
    if first == "-c":
        code, *rest = rest
        sys.argv, sys.path[0] = ["-c", *rest], ""
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv, sys.path[0] = rest, ""
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    listener = socket.socket(fileno=int(sys.argv[1]))
    if listener not in select.select([STDIN, listener], [], [])[0]:  # no test needed a program
        sys.exit()
    first, _ = listener.accept()
    gc.disable()

    import torch

    ours = (
        "runs.distill",
        "report.page",
        "export.programs",
        "config.load",
        "commands.command",
        "embedding.embed_source",
    )
    # timm imports wandb, which reads the docstrings of its classes: seconds, if many modules are there already.
    for name in ("wandb", "timm", "composer", "streaming", *(f"d2v_composer.{name}" for name in ours)):
        with suppress(ImportError):  # its place may change, and a later import takes only longer
            importlib.import_module(name)
    know_the_machine()
    gc.collect()
    gc.enable()
    gc.freeze()  # at its end, a program need not look for garbage among the imports: 1.4 s
    run(serve(listener, first))
