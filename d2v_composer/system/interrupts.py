"""Ctrl-C (SIGINT) and SIGTERM end a command by an exception, so that files are closed; a second Ctrl-C ends it at once.

"Second" is a Ctrl-C after either of them.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from d2v_composer.system.when_imported import when_imported

__all__ = [
    "NAMES",
    "end_at_interrupt",
    "handle_interrupts",
    "is_ignored",
    "keep_status",
    "received",
    "second_ends_at_once",
    "status",
]

NAMES = {signal.SIGINT: "Interrupted", signal.SIGTERM: "SIGTERM"}

Handler = Callable[[int, FrameType | None], Any]

_is_ignored = False
_handlers: dict[signal.Signals, Handler] = {}
_received: signal.Signals | None = None


def handle_interrupts() -> None:
    """Raise KeyboardInterrupt at the first SIGINT or SIGTERM.

    A shell lets jobs in the background ignore SIGINT; they go on ignoring it.
    """
    for signum in NAMES:
        _handle(signum, _interrupt)


def end_at_interrupt() -> None:
    """End this process at SIGINT, as long as it has begun nothing."""
    _handle(signal.SIGINT, _end_before_start)


def is_ignored() -> bool:
    """Tell whether this process ignores SIGINT."""
    return _is_ignored or signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def received() -> signal.Signals | None:
    """Return the signal that raised KeyboardInterrupt; a later exception is its consequence, such as a lost rank."""
    return _received


def status(signum: int) -> int:
    """Return the exit status of a process that a signal ends, as shells give it."""
    return 128 + signum


def second_ends_at_once() -> None:
    """End this process and its workers at the next SIGINT, without clean-up."""
    _handle(signal.SIGINT, _end_at_once)


def keep_status() -> None:
    """Let no SIGTERM end this process any more, whose exit status is known.

    If all ranks end by one error, Composer's launcher sends it to those that need a moment longer to exit.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _handle(signum: signal.Signals, handler: Handler) -> None:
    global _is_ignored
    _is_ignored = is_ignored()
    _handlers[signum] = handler
    _install(signum)


def _install(signum: signal.Signals) -> None:
    ignores = signum == signal.SIGINT and _is_ignored
    with suppress(ValueError):  # in another thread, where Composer installs none either
        signal.signal(signum, signal.SIG_IGN if ignores else _handlers[signum])


def _install_all() -> None:
    for signum in _handlers:
        _install(signum)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    global _received
    _received = signal.Signals(signum)
    second_ends_at_once()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Composer's launcher sends it right after Ctrl-C
    raise KeyboardInterrupt


def _end_before_start(signum: int, frame: Any) -> None:
    with suppress(OSError):
        os.write(2, b"Interrupted\n")
    os._exit(status(signum))


def _end_at_once(signum: int, frame: Any) -> None:
    with suppress(OSError):
        os.write(2, b"Interrupted again: ended at once\n")
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(status(_received or signum))


def _end_as_usual() -> None:
    """Let a signal end a forked process, such as a worker of another package, even while it runs no Python."""
    for signum in _handlers:
        if callable(signal.getsignal(signum)):
            signal.signal(signum, signal.SIG_DFL)
    _handlers.clear()


os.register_at_fork(after_in_child=_end_as_usual)
when_imported("composer.core.engine", _install_all)  # its import installs handlers of Composer's
