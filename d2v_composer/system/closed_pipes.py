"""Survive a reader that leaves, as ``head`` does: the command goes on, and what it prints after that is lost."""

import io
import os
import stat
import sys
from typing import Any

__all__ = ["survive_closed_pipes"]


class _Pipe(io.FileIO):
    """A pipe that becomes /dev/null when its reader leaves, for child processes too."""

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return super().write(data)


def survive_closed_pipes() -> None:
    """Let standard output and errors of this process survive the end of their readers."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            descriptor = stream.fileno()
        except (AttributeError, OSError, ValueError):  # none, or replaced by something without a file
            continue
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            stream.flush()
            pipe = io.BufferedWriter(_Pipe(descriptor, "w", closefd=False))
            text = io.TextIOWrapper(pipe, stream.encoding, stream.errors, line_buffering=True)
            setattr(sys, name, text)
