"""Workers outlive SIGTERM but not their parent; only Composer's launcher ends its ranks with it."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.utils.data import DataLoader, Dataset

from d2v_composer.system.errors import InputError
from d2v_composer.system.processes import FORK, POLL_SECONDS, SPAWN, _is_launcher, allow_open_files, block_stop_signals


class Numbers(Dataset[int]):
    """The worker's process ID and 99 zeros, slowly."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return 0 if index else os.getpid()


def test_a_data_worker_outlives_sigterm() -> None:
    loader = DataLoader(Numbers(), batch_size=1, num_workers=1, multiprocessing_context=FORK)
    batches = iter(loader)
    worker = int(next(batches))
    assert worker != os.getpid()
    os.kill(worker, signal.SIGTERM)
    assert sum(1 for _ in batches) == 99
    assert psutil.pid_exists(worker) is False


def test_a_worker_that_was_suspended_goes_on() -> None:
    # As by Ctrl-Z and fg, or by a scheduler that suspends a job. Longer than the watching thread waits at a time.
    worker = FORK.Process(target=time.sleep, args=(600,), daemon=True)
    worker.start()
    time.sleep(0.1)  # until the thread waits
    os.kill(worker.pid, signal.SIGSTOP)
    time.sleep(POLL_SECONDS + 0.1)
    os.kill(worker.pid, signal.SIGCONT)
    worker.join(0.2)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.parametrize("kind", [FORK, pytest.param(SPAWN, marks=pytest.mark.slow)])
def test_a_parent_ends_its_worker(kind: Any) -> None:
    worker = kind.Process(target=time.sleep, args=(600,), daemon=True)
    worker.start()
    os.kill(worker.pid, signal.SIGTERM)  # at once, before it has run any of our code
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode in (0, -signal.SIGKILL)


def test_a_worker_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2v_composer.system.processes.END_SECONDS", 0.2)
    monkeypatch.setattr("d2v_composer.system.processes.end_with_parent", lambda: None)  # a hang
    worker = FORK.Process(target=time.sleep, args=(600,), daemon=True)
    worker.start()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL


def test_a_worker_ends_with_its_parent() -> None:
    receive, send = multiprocessing.Pipe(duplex=False)
    parent = multiprocessing.get_context("fork").Process(target=_start_worker, args=(send,))
    parent.start()
    worker = psutil.Process(receive.recv())
    parent.kill()
    parent.join()
    worker.wait(timeout=30)


def _start_worker(send: Connection) -> None:
    worker = FORK.Process(target=time.sleep, args=(600,))
    worker.start()
    send.send(worker.pid)
    time.sleep(600)


def test_a_blocked_sigterm_arrives_later() -> None:
    received: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with block_stop_signals():
            signal.raise_signal(signal.SIGTERM)
            assert received == []
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_the_limit_of_open_files_is_raised_up_to_the_hard_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(32, 4096)]
    monkeypatch.setattr("resource.getrlimit", lambda _: limits[-1])
    monkeypatch.setattr("resource.setrlimit", lambda _, limit: limits.append(limit))
    allow_open_files(300)
    allow_open_files(200)
    assert limits == [(32, 4096), (300, 4096)]
    with pytest.raises(InputError, match=r"^this run needs 5000 open files, the limit is 4096 "):
        allow_open_files(5000)


@pytest.mark.parametrize(
    ("arguments", "is_launcher"),
    [
        (["composer", "-n", "2"], True),
        (["-u", "composer"], True),
        (["nohup.py", "composer"], False),
        (["-c", "import time; time.sleep(600)"], False),
    ],
)
def test_only_composers_launcher_is_one(tmp_path: Path, arguments: list[str], is_launcher: bool) -> None:
    """A shell or nohup that started a rank may end before it."""
    for name in ("composer", "nohup.py"):
        (tmp_path / name).write_text("import time; time.sleep(600)")
    parent = subprocess.Popen([sys.executable, *arguments], cwd=tmp_path)
    try:
        while not psutil.Process(parent.pid).cmdline():  # empty at first
            time.sleep(0.01)
        assert _is_launcher(parent.pid) == is_launcher
    finally:
        parent.kill()
        parent.wait()
    assert not _is_launcher(parent.pid)
