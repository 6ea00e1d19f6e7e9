"""Promise 11, over many epochs, checkpoints and retrievals: nothing is left behind, and nothing grows meanwhile."""

import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from helpers import (
    datasets_of,
    family_of,
    inode_of,
    losses_of,
    shared_memory_of,
    small_run,
    started_ranks,
    train_command,
    wait_until,
)
from programs.preloaded import Program


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


def anonymous_megabytes(pid: int) -> float:
    """Return a process's own memory. Unlike USS, it does not depend on how many pages a forked worker still shares."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def usage_of(program: Program, temporary: Path) -> Usage:
    main, *workers = family_of(program.pid)
    return Usage(
        anonymous_megabytes(program.pid),
        main.num_fds(),  # workers live for an epoch, with copies of these
        main.num_threads(),
        1 + len(workers),
        len(shared_memory_of(program.pid)),
        len(list(temporary.rglob("*"))),
    )


def step_of(folder: Path) -> int:
    """Return the last step in a run's log; -1 without one."""
    return max(losses_of(folder), default=-1)


def long_run(folder: Path, labeled: Path, num_steps: int, interval: int) -> list[str]:
    return small_run(
        folder,
        labeled / "train",
        f"max_duration={num_steps}ba",
        "global_train_batch_size=4",
        "student.depth=1",
        f"save_interval={interval}ba",
        f"retrieval.{datasets_of(labeled)}",
        f"retrieval.interval={interval}ba",
        "retrieval.baselines=[]",
        "retrieval.at_start=false",
        "train_loader.num_workers=1",
        "callbacks.health.interval=100ba",
    )


def assert_nothing_grows(first: list[Usage], second: list[Usage]) -> None:
    """Compare the halves of a run."""
    for name in ("descriptors", "threads", "processes", "shared_memory", "temporary"):
        # The minimum, since some come and go; a leak per checkpoint, retrieval or epoch would add three.
        before, after = (min(getattr(usage, name) for usage in half) for half in (first, second))
        assert after - before <= 1, name
    megabytes = [statistics.median(usage.megabytes for usage in half) for half in (first, second)]
    assert megabytes[1] - megabytes[0] < 8, megabytes
    print(f"\n{first[0]} at the beginning, {second[-1]} at the end")


@pytest.mark.parametrize(
    ("num_steps", "warm_up", "interval"),
    [pytest.param(900, 300, 100, marks=pytest.mark.slow), pytest.param(20_000, 1_000, 500, marks=pytest.mark.campaign)],
)
def test_a_long_run_does_not_leak(
    labeled: Path, tmp_path: Path, temporary: Path, num_steps: int, warm_up: int, interval: int
) -> None:
    folder = tmp_path / "run"
    shared_memory: set[tuple[str, int]] = set()
    command = train_command(long_run(folder, labeled, num_steps, interval))[1:]
    options: dict[str, Any] = {"ranks": 1, "environment": {"TMPDIR": str(temporary)}}

    # Kill it in its first third, and restart it.
    with started_ranks(*command, **options) as [program]:
        wait_until(lambda: step_of(folder) >= interval or program.poll() is not None, seconds=600)
        shared_memory |= shared_memory_of(program.pid)
    program.wait(timeout=30)
    left_by_kill = set(temporary.rglob("*"))
    usages: dict[int, list[Usage]] = defaultdict(list)
    with started_ranks(*command, **options) as [program]:
        while program.poll() is None:
            step = step_of(folder)
            if warm_up < step < num_steps - 1:  # after the last step the run shuts down
                with contextlib.suppress(psutil.Error, OSError, IndexError):  # it has just ended
                    usages[(step - warm_up) * 4 // (num_steps - warm_up)].append(usage_of(program, temporary))
                    shared_memory |= shared_memory_of(program.pid)
            time.sleep(0.25)
        assert program.poll() == 0
    assert len(losses_of(folder)) == num_steps

    assert_nothing_grows(usages[0] + usages[1], usages[2] + usages[3])
    assert [path for path, inode in shared_memory if inode_of(path) == inode] == []
    # Torch keeps its cache.
    left = {str(path.relative_to(temporary)) for path in set(temporary.rglob("*")) - left_by_kill}
    assert not {name for name in left if not name.startswith("torchinductor_")}
