"""Survive a reader that leaves, as ``head`` does: the command goes on, and what it prints after that is lost."""

import ctypes
import io
import multiprocessing
import os
import resource
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import popen_fork, popen_spawn_posix, resource_tracker
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from d2v_composer.system.errors import InputError
from d2v_composer.system.when_imported import when_imported

# MERGED FROM d2v_composer/system/processes.py: Lifetimes of processes: a worker lives as long as its parent, a

POLL_SECONDS = 0.5
# The signal with which a parent ends its workers; no scheduler sends it.
END = signal.SIGRTMIN
# Time for a worker to end before it is killed.
END_SECONDS = 5.0


@contextmanager
def block_stop_signals() -> Iterator[None]:
    """Block SIGTERM and SIGINT in processes started within the block, from their first instruction on.

    A signal that arrives meanwhile reaches this process at the end of the block.
    """
    resource_tracker.ensure_running()  # its start would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, END})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _StartAndEnd:
    """Mixin for multiprocessing's Popen classes: start with signals blocked, end with :data:`END`."""

    def _launch(self, process: Any) -> None:
        popen: Any = super()
        with block_stop_signals():
            popen._launch(process)

    def terminate(self) -> None:
        popen: Any = self
        popen._send_signal(END)
        if popen.wait(END_SECONDS) is None:
            popen.kill()


class _ForkPopen(_StartAndEnd, popen_fork.Popen):
    pass


class _SpawnPopen(_StartAndEnd, popen_spawn_posix.Popen):
    pass


class Worker(BaseProcess):
    """A process that outlives SIGTERM and Ctrl-C, but not its parent."""

    def run(self) -> None:
        end_with_parent()
        super().run()


class ForkedWorker(Worker):
    _start_method, _Popen = "fork", _ForkPopen


class SpawnedWorker(Worker):
    _start_method, _Popen = "spawn", _SpawnPopen


FORK: Any = ForkContext()
SPAWN: Any = SpawnContext()
FORK.Process, SPAWN.Process = ForkedWorker, SpawnedWorker


def end_with_parent() -> None:
    """End this worker process when its parent ends or asks for it. Elsewhere, or called again, do nothing.

    An orphan would otherwise wait forever for its siblings and hold the locks that it inherited.
    """
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == end_with_parent.__name__ for thread in threading.enumerate()):
        return

    started_by = os.getppid()  # the parent, or a server that forks for it

    def watch() -> None:
        # After a fork, siblings hold the parent's sentinel too.
        while os.getppid() == started_by and parent.is_alive():
            received = signal.sigtimedwait({END}, POLL_SECONDS)
            # After SIGSTOP and SIGCONT, Python returns a signal that nobody sent.
            if received is not None and (received.si_signo, received.si_pid) == (END, parent.pid):
                os._exit(0)
        os._exit(1)

    threading.Thread(target=watch, name=end_with_parent.__name__, daemon=True).start()


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL at this process's parent's death; for a worker's initializer.

    The signal comes when the thread that started this process ends: start workers from a thread that lives as long.
    """
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # the parent died before the call
        os._exit(1)


def end_workers() -> None:
    """Kill this process's workers, whose work is lost, and wait for their end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a killed data worker
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()


def end_with_launcher() -> None:
    """Send this rank SIGTERM when Composer's launcher ends; without a launcher, do nothing.

    A killed launcher leaves its ranks running. After SIGTERM, a rank that trains saves and exits.
    """
    launcher = os.getppid()
    if "LOCAL_RANK" not in os.environ or not _is_launcher(launcher):
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(POLL_SECONDS)
        with suppress(OSError):  # stderr may be closed
            print(f"the launcher, process {launcher}, is gone: this rank ends", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name=end_with_launcher.__name__, daemon=True).start()


def _is_launcher(pid: int) -> bool:
    try:
        command = psutil.Process(pid).cmdline()
    except psutil.Error:
        return False
    # python /…/bin/composer …, or python -m composer.cli.launcher …
    program = next((part for part in command[1:] if not part.startswith("-")), "")
    return Path(program).name == "composer" or program.startswith("composer.")


def allow_open_files(needed: int) -> None:
    """Raise the limit of open files of this process and its children to ``needed``.

    Raises:
        InputError: The machine's hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(f"this run needs {needed} open files, the limit is {hard} (ulimit -Hn): raise it")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


# MERGED FROM d2v_composer/system/processes.py: Ctrl-C (SIGINT) and SIGTERM end a command by an exception, so that

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
