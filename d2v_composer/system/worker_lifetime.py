"""How long a process lives: a worker as long as the process it works for, a rank as long as its launcher.

Schedulers such as SLURM and systemd send SIGTERM to every process of a run. Only the training process knows what to do
then: finish the batch, save, and go. Its workers have to go on until it does, or there is no batch to finish and no
checkpoint to upload. So SIGTERM is blocked in processes of the contexts :data:`FORK` and :data:`SPAWN`, and their
parent asks them to end with another signal.
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
from multiprocessing.context import ForkContext, ForkProcess, SpawnContext, SpawnProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
from composer.loggers import remote_uploader_downloader
from composer.utils import remote_uploader

from d2v_composer.system.errors import InputError

__all__ = [
    "FORK",
    "SPAWN",
    "allow_open_files",
    "block_sigterm",
    "end_with_launcher",
    "end_with_parent",
    "uploads_outlive_sigterm",
]

POLL_SECONDS = 0.5
# What a parent asks its workers to end with: no scheduler sends it.
END = signal.SIGRTMIN
# How long a worker may take to end when asked, before it is killed.
END_SECONDS = 5.0


@contextmanager
def block_sigterm() -> Iterator[None]:
    """Start processes within the block in which SIGTERM is blocked from their first instruction on.

    A signal that arrives meanwhile reaches this process afterwards.
    """
    resource_tracker.ensure_running()  # starting it would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, END})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Outliving:
    """Mixin of multiprocessing's handles of a process: starts it with SIGTERM blocked, and ends it all the same."""

    def _launch(self, process: Any) -> None:
        handle: Any = super()
        with block_sigterm():
            handle._launch(process)

    def terminate(self) -> None:
        handle: Any = self
        handle._send_signal(END)
        if handle.wait(END_SECONDS) is None:
            handle.kill()


class _ForkHandle(_Outliving, popen_fork.Popen):
    pass


class _SpawnHandle(_Outliving, popen_spawn_posix.Popen):
    pass


class ForkedWorker(ForkProcess):
    """A forked process that outlives SIGTERM, but not its parent."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 -- multiprocessing's name
        return _ForkHandle(process_obj)

    def run(self) -> None:
        end_with_parent()
        super().run()


class SpawnedWorker(SpawnProcess):
    """A spawned process that outlives SIGTERM, but not its parent."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802 -- multiprocessing's name
        return _SpawnHandle(process_obj)

    def run(self) -> None:
        end_with_parent()
        super().run()


class _ForkContext(ForkContext):
    Process = ForkedWorker


class _SpawnContext(SpawnContext):
    Process = SpawnedWorker


FORK, SPAWN = _ForkContext(), _SpawnContext()


def end_with_parent() -> None:
    """Make this worker process end when its parent does or asks it to; elsewhere, and again, do nothing.

    Without its parent it would go on with what it has, wait for ever for processes that are gone, and hold the locks
    that it inherited.
    """
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == end_with_parent.__name__ for thread in threading.enumerate()):
        return

    started_by = os.getppid()  # the parent, or a server that forks for it

    def watch() -> None:
        # Of a fork, the sentinel is held by its siblings as well.
        while os.getppid() == started_by and parent.is_alive():
            if signal.sigtimedwait({END}, POLL_SECONDS) is not None:
                os._exit(0)
        os._exit(1)

    threading.Thread(target=watch, name=end_with_parent.__name__, daemon=True).start()


def end_with_launcher() -> None:
    """Send this rank SIGTERM when Composer's launcher, which started it, is gone; without a launcher do nothing.

    A launcher that is killed leaves its ranks behind. A rank that trains then saves before it goes.
    """
    launcher = os.getppid()
    if "LOCAL_RANK" not in os.environ or not _is_launcher(launcher):
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(POLL_SECONDS)
        with suppress(OSError):  # nothing may be at the other end any more
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
    """Raise this process's limit of open files as far as needed, which the processes that it starts inherit.

    Raises:
        InputError: The machine allows fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(
            f"a process may have {hard} files open here (ulimit -Hn), and {needed} are needed: raise the limit"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextmanager
def uploads_outlive_sigterm() -> Iterator[None]:
    """Make Composer's uploaders that are constructed within the block start their processes in :data:`SPAWN`.

    Composer 0.32 has no argument for it. A checkpoint is uploaded after the SIGTERM for which it was saved.
    """
    patched: list[Any] = [remote_uploader, remote_uploader_downloader]
    for module in patched:
        module.multiprocessing = SimpleNamespace(get_context=lambda method: SPAWN)
    try:
        yield
    finally:
        for module in patched:
            module.multiprocessing = multiprocessing
