"""A long run does not leak memory, descriptors, threads, processes or files."""

import contextlib
import getpass
import os
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from helpers import command_environment, inode_of, losses_of, shared_memory_of, small_run, train_command


class Usage(NamedTuple):
    """The resources of a process and its workers."""

    megabytes: float
    descriptors: int
    threads: int
    processes: int
    shared_memory: int
    """Number of files."""
    temporary: int
    """Number of files and folders."""


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files with a short path, since it holds sockets."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield Path(folder)


@contextmanager
def started(command: list[str], temporary: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a run with its own folder for temporary files."""
    environment = command_environment() | {"TMPDIR": str(temporary)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def anonymous_megabytes(pid: int) -> float:
    """Return a process's own memory. Unlike USS, it does not depend on how many pages a forked worker still shares."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def usage_of(process: subprocess.Popen[bytes], temporary: Path) -> Usage:
    main = psutil.Process(process.pid)
    family = [main, *main.children(recursive=True)]
    return Usage(
        anonymous_megabytes(process.pid),
        main.num_fds(),  # workers live for an epoch, with copies of these
        main.num_threads(),
        len(family),
        len(shared_memory_of(process.pid)),
        len(list(temporary.rglob("*"))),
    )


def step_of(folder: Path) -> int:
    """Return the last step in a run's log; -1 without one."""
    with (
        contextlib.suppress(FileNotFoundError, ValueError, IndexError, StopIteration),
        (folder / "log.jsonl").open("rb") as file,
    ):
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
        line = next(line for line in reversed(file.read().splitlines()) if b'"loss/train/total"' in line)
        return int(line.split(b'"step": ')[1].split(b",")[0])
    return -1


def long_run(folder: Path, labelled: Path, num_steps: int, interval: int) -> list[str]:
    arguments = small_run(
        folder,
        labelled / "train",
        f"max_duration={num_steps}ba",
        "global_train_batch_size=4",
        "student.depth=1",
        f"save_interval={interval}ba",
        f"retrieval.datasets={{cifar10: {{format: mds, root: {labelled}}}}}",
        f"retrieval.interval={interval}ba",
        "retrieval.references=[]",
        "retrieval.at_start=false",
        "train_loader.num_workers=1",
        "callbacks.health.interval=100ba",
    )
    return train_command(arguments)


@pytest.mark.parametrize(
    ("num_steps", "warm_up", "interval"),
    [(900, 300, 100), pytest.param(20_000, 1_000, 500, marks=pytest.mark.campaign)],
)
def test_a_long_run_does_not_leak(
    labelled: Path, tmp_path: Path, temporary: Path, num_steps: int, warm_up: int, interval: int
) -> None:
    folder = tmp_path / "run"
    shared_memory: set[tuple[str, int]] = set()
    command = long_run(folder, labelled, num_steps, interval)

    # Kill it in its first third, and restart it.
    with started(command, temporary) as process:
        while step_of(folder) < interval:
            assert process.poll() is None
            time.sleep(0.1)
        shared_memory |= shared_memory_of(process.pid)
    usages: dict[int, list[Usage]] = defaultdict(list)
    with started(command, temporary) as process:
        while process.poll() is None:
            step = step_of(folder)
            if warm_up < step < num_steps - 1:  # after the last step the run shuts down
                with contextlib.suppress(psutil.Error, OSError, IndexError):  # it has just ended
                    usages[(step - warm_up) * 4 // (num_steps - warm_up)].append(usage_of(process, temporary))
                    shared_memory |= shared_memory_of(process.pid)
            time.sleep(0.25)
        assert process.returncode == 0
    assert len(losses_of(folder)) == num_steps

    first, last = usages[0] + usages[1], usages[2] + usages[3]
    for name in ("descriptors", "threads", "processes", "shared_memory", "temporary"):
        # The minimum, since some come and go; a leak per checkpoint, retrieval or epoch would add three.
        before, after = (min(getattr(usage, name) for usage in half) for half in (first, last))
        assert after - before <= 1, name
    megabytes = [statistics.median(usage.megabytes for usage in half) for half in (first, last)]
    assert megabytes[1] - megabytes[0] < 8, megabytes
    print(f"\n{num_steps} steps: {first[0]} at the beginning, {last[-1]} at the end")

    assert shared_memory != set()
    assert [path for path, inode in shared_memory if inode_of(path) == inode] == []
    # A lock cannot be removed while others may wait for it; torch keeps its cache.
    left = {str(path.relative_to(temporary)) for path in temporary.rglob("*")} - {f"torchinductor_{getpass.getuser()}"}
    assert left == {f"d2v-{os.getuid()}-scratch.lock"}
