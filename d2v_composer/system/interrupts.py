"""Ctrl-C (SIGINT) ends a command: the first one by an exception, so that files are closed; a second one at once."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from d2v_composer.system.when_imported import when_imported

__all__ = [
    "EXIT_STATUS",
    "end_at_interrupt",
    "handle_interrupts",
    "is_ignored",
    "second_ends_at_once",
    "was_interrupted",
]

EXIT_STATUS = 128 + signal.SIGINT

Handler = Callable[[int, FrameType | None], Any]

_is_ignored = _was_interrupted = False
_handler: Handler | None = None


def handle_interrupts() -> None:
    """Raise KeyboardInterrupt at the first SIGINT.

    A shell lets jobs in the background ignore SIGINT; they go on ignoring it.
    """
    _handle_by(_interrupt)


def end_at_interrupt() -> None:
    """End this process at SIGINT, as long as it has begun nothing."""
    _handle_by(_end_before_start)


def is_ignored() -> bool:
    """Tell whether this process ignores SIGINT."""
    return _is_ignored or signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def was_interrupted() -> bool:
    """Tell whether KeyboardInterrupt was raised: an exception after it is its consequence, such as a lost rank."""
    return _was_interrupted


def second_ends_at_once() -> None:
    """End this process and its workers at the next SIGINT, without clean-up."""
    _handle_by(_end_at_once)


def _handle_by(handler: Handler) -> None:
    global _is_ignored, _handler
    _is_ignored, _handler = is_ignored(), handler
    _install()


def _install() -> None:
    if _handler is not None:
        with suppress(ValueError):  # in another thread, where Composer installs none either
            signal.signal(signal.SIGINT, signal.SIG_IGN if _is_ignored else _handler)


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


when_imported("composer.core.engine", _install)  # its import installs a handler of Composer's
