"""Run a command next to the preflight: wait for it, signal it, measure its memory."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from typing import IO

import psutil

__all__ = ["RunningCommand", "running"]

POLL_SECONDS = 0.2
MEASURE_SECONDS = 1.0
LINES_SHOWN = 15


class RunningCommand:
    """A command in a process group of its own.

    Args:
        process: The leader of the group.
        output: The file that receives the output.

    Attributes:
        peak_bytes: The most memory that its processes held at a time, shared pages counted once (PSS).
    """

    def __init__(self, process: subprocess.Popen[bytes], output: IO[bytes]) -> None:
        self.process = process
        self.output = output
        self.peak_bytes = 0
        self.measured_at = 0.0

    def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        """Wait until a condition holds, the command ends, or it prints nothing for a time.

        Args:
            until: The condition.
            seconds: The longest time without output.

        Returns:
            Whether the condition holds.
        """
        size, since = -1, time.monotonic()
        while not until():
            if self.process.poll() is not None:
                return until()
            if (printed := os.fstat(self.output.fileno()).st_size) != size:
                size, since = printed, time.monotonic()
            elif time.monotonic() - since > seconds:
                return False
            self._measure()
            time.sleep(POLL_SECONDS)
        return True

    def wait_for_end(self, seconds: float) -> int | None:
        """Wait for the end and return the exit status; ``None`` if the command is still running."""
        self.wait(lambda: self.process.poll() is not None, seconds)
        return self.process.poll()

    def signal(self, signum: signal.Signals) -> None:
        """Send a signal to every process of the command, as systemd and SLURM do."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signum)

    def last_lines(self) -> list[str]:
        """Return the end of the output."""
        self.output.seek(0)
        return self.output.read().decode(errors="replace").splitlines()[-LINES_SHOWN:]

    def _measure(self) -> None:
        if time.monotonic() - self.measured_at < MEASURE_SECONDS:
            return
        self.measured_at = time.monotonic()
        total = 0
        with suppress(psutil.Error):
            first = psutil.Process(self.process.pid)
            for each in (first, *first.children(recursive=True)):
                with suppress(psutil.Error):  # the process has just ended
                    total += each.memory_full_info().pss
        self.peak_bytes = max(self.peak_bytes, total)


@contextmanager
def running(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[RunningCommand]:
    """Run a command while the block lasts; then kill its remaining processes."""
    with TemporaryFile() as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        command = RunningCommand(process, output)
        try:
            yield command
        finally:
            command.signal(signal.SIGKILL)
            process.wait()
