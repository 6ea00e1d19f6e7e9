"""A lock has one holder; forked processes of the holder keep it."""

import errno
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from d2v_composer.system import files
from d2v_composer.system.files import acquire, sole_user

FORK = multiprocessing.get_context("fork")


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"
    with sole_user(path) as first, sole_user(path) as second:
        assert (first, second) == (True, False)
        assert acquire(path) is None
    descriptor = acquire(path)
    assert descriptor is not None
    with sole_user(path) as alone:
        assert not alone
    os.close(descriptor)
    with pytest.raises(KeyError), sole_user(path):
        raise KeyError
    with sole_user(path) as alone:
        assert alone


def test_acquire_waits_for_the_holder(tmp_path: Path) -> None:
    descriptor = acquire(tmp_path / "lock")
    assert descriptor is not None
    start = time.monotonic()
    assert acquire(tmp_path / "lock", wait=0.2) is None
    assert time.monotonic() - start >= 0.2
    threading.Timer(0.5, os.close, (descriptor,)).start()
    with sole_user(tmp_path / "lock", wait=30) as alone:
        assert alone


def test_a_file_system_without_locks_is_used_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:

    def flock(*_: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    files._warn_of_no_locks.cache_clear()
    monkeypatch.setattr(files.fcntl, "flock", flock)
    for _ in range(2):
        with sole_user(tmp_path / "lock") as alone:
            assert alone
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "this file system has no locks ([Errno 38] Function not implemented)"
    ]


def test_what_nobody_must_use_counts_as_used_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as another run's temporary folder, before it is removed."""

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with sole_user(tmp_path / "lock", without_locks=False) as is_unused:
        assert not is_unused


def test_waiting_processes_lock_the_new_file_after_the_holder_removed_the_old(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    descriptor = acquire(path)
    assert descriptor is not None
    waiting: list[int | None] = []
    waiter = threading.Thread(target=lambda: waiting.append(acquire(path, wait=30)))
    waiter.start()
    time.sleep(0.1)
    path.unlink()
    os.close(descriptor)
    waiter.join()
    assert waiting[0] is not None
    assert acquire(path) is None
    os.close(waiting[0])


def test_a_killed_holder_keeps_the_lock_until_its_forked_processes_end(tmp_path: Path) -> None:
    receive, send = FORK.Pipe(duplex=False)
    user = FORK.Process(target=_hold_with_worker, args=(tmp_path / "lock", send))
    user.start()
    worker = receive.recv()
    user.kill()
    user.join()
    assert acquire(tmp_path / "lock") is None
    os.kill(worker, signal.SIGKILL)
    with sole_user(tmp_path / "lock", wait=30) as alone:
        assert alone


def _hold_with_worker(path: Path, send: Connection) -> None:
    with sole_user(path):
        worker = FORK.Process(target=time.sleep, args=(600,))
        worker.start()
        send.send(worker.pid)
        time.sleep(600)
