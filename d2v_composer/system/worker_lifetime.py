"""Lifetimes of processes: a worker lives as long as its parent, a rank as long as its launcher.

Schedulers such as SLURM and systemd send SIGTERM to every process of a run, a terminal's Ctrl-C sends SIGINT. Only the
training process may react: it finishes the batch, saves and exits. Its workers must keep running until then, to deliver
the batch and upload the checkpoint. Processes of the contexts :data:`FORK` and :data:`SPAWN` therefore block both
signals, and their parent ends them with another one.
"""

import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import popen_fork, popen_spawn_posix, resource_tracker
from multiprocessing.context import ForkContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from d2v_composer.system.errors import InputError

__all__ = [
    "FORK",
    "SPAWN",
    "allow_open_files",
    "block_stop_signals",
    "end_with_launcher",
    "end_with_parent",
    "end_workers",
]

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
