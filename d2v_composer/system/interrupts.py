"""Ctrl-C (SIGINT) ends a command: the first one by an exception, so that files are closed; a second one at once."""

import multiprocessing
import os
import signal
from contextlib import suppress
from types import FrameType
from typing import Any

__all__ = [
    "EXIT_STATUS",
    "end_at_interrupt",
    "handle_interrupts",
    "is_ignored",
    "second_ends_at_once",
    "was_interrupted",
]

EXIT_STATUS = 128 + signal.SIGINT

_is_ignored = _was_interrupted = False


def handle_interrupts() -> None:
    """Raise KeyboardInterrupt at the first SIGINT.

    Call it again after imports: Composer installs handlers when it is imported. A shell lets jobs in the background
    ignore SIGINT; they go on ignoring it.
    """
    global _is_ignored
    _is_ignored = _is_ignored or signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if not _was_interrupted:
        signal.signal(signal.SIGINT, signal.SIG_IGN if _is_ignored else _interrupt)


def end_at_interrupt() -> None:
    """End this process at SIGINT, as long as it has begun nothing."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end_before_start)


def is_ignored() -> bool:
    """Tell whether this process ignores SIGINT."""
    return _is_ignored or signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def was_interrupted() -> bool:
    """Tell whether KeyboardInterrupt was raised: an exception after it is its consequence, such as a lost rank."""
    return _was_interrupted


def second_ends_at_once() -> None:
    """End this process and its workers at the next SIGINT, without clean-up."""
    signal.signal(signal.SIGINT, _end_at_once)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    global _was_interrupted
    _was_interrupted = True
    second_ends_at_once()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Composer's launcher sends it right after Ctrl-C
    raise KeyboardInterrupt


def _end_before_start(signum: int, frame: Any) -> None:
    with suppress(OSError):
        os.write(2, b"Interrupted\n")
    os._exit(EXIT_STATUS)


def _end_at_once(signum: int, frame: Any) -> None:
    with suppress(OSError):
        os.write(2, b"Interrupted twice: ended at once\n")
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(EXIT_STATUS)
