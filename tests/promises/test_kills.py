"""A run killed at a random moment ends as if it were not; a long one leaks nothing."""

import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from small_runs import Run

from helpers import (
    ROOT,
    assert_same_losses,
    assert_same_student,
    datasets_of,
    family_of,
    has_trained,
    inode_of,
    losses_of,
    run_ranks,
    shared_memory_of,
    started_ranks,
    student_of,
    train_command,
    wait_until,
)
from programs.preloaded import Program

NUM_BATCHES = 24
POLL_SECONDS = 0.005


def quickstart(folder: Path, labeled: Path) -> list[str]:
    """Return the command of the quickstart's teacher, student and data, for 24 batches of 8."""
    arguments = [str(ROOT / "yamls" / "quickstart.yaml"), f"save_folder={folder}", "precision=fp32", "report=false"]
    arguments += [f"max_duration={NUM_BATCHES}ba", "scheduler.t_warmup=4ba", "global_train_batch_size=8"]
    arguments += ["save_interval=3ba", "retrieval.interval=8ba", "retrieval.baselines=[pixels]"]
    return train_command([*arguments, f"retrieval.datasets.cifar10.root={labeled}"])[1:]


def kill_all(programs: list[Program]) -> None:
    """Kill ranks and workers at once, as the kernel does."""
    for process in [member for program in programs if program.poll() is None for member in family_of(program.pid)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for program in programs:
        program.wait(timeout=30)


def moment_of(number: int) -> tuple[Callable[[Path], bool], float]:
    """Return what holds in a run's folder, and for how many seconds, when the run is killed."""
    dice, start = random.Random(number), time.monotonic()
    batch = dice.randrange(1, NUM_BATCHES)
    if number % 4 == 0:  # in the start-up
        seconds = dice.uniform(0, 3)
        return lambda folder: time.monotonic() > start + seconds or has_trained(folder), 0
    if number % 4 == 1:  # after a checkpoint, or in the next
        name = f"ep*-ba{3 * dice.randrange(1, NUM_BATCHES // 3)}-rank0.pt"
        return lambda folder: any(folder.glob(name)), dice.uniform(0, 0.03)
    if number % 4 == 2:  # in the retrieval after a batch
        batch = dice.choice([7, 15, 23])
    return lambda folder: batch in losses_of(folder), dice.uniform(0, 0.2)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, labeled: Path) -> Callable[[int], Path]:
    """Return the folder of a run that is not killed, by its number of ranks."""

    @cache
    def run(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        run_ranks(*quickstart(folder, labeled), ranks=ranks)
        return folder

    return run


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ranks"), [(2, 1), (1, 2)])
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_weights(
    number: int, ranks: int, undisturbed: Callable[[int], Path], labeled: Path, tmp_path: Path
) -> None:
    """The same command resumes after SIGKILL anywhere; with one rank, bit for bit."""
    expected, command = undisturbed(ranks), quickstart(tmp_path, labeled)
    with started_ranks(*command, ranks=ranks) as programs:
        holds, wait = moment_of(number)
        while not holds(tmp_path):
            assert [program.poll() for program in programs] == [None] * ranks, "the run ended before it was killed"
            time.sleep(POLL_SECONDS)
        time.sleep(wait)
        kill_all(programs)
    run_ranks(*command, ranks=ranks)
    if ranks == 1:
        assert losses_of(tmp_path) == losses_of(expected)
        assert_same_student(tmp_path, expected)
    else:
        assert_same_losses(losses_of(tmp_path), losses_of(expected), NUM_BATCHES)
        torch.testing.assert_close(student_of(tmp_path), student_of(expected))
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


class Usage(NamedTuple):
    """The resources of a process and its workers; the last two are numbers of files."""

    megabytes: float
    descriptors: int
    threads: int
    processes: int
    shared_memory: int
    temporary: int


def usage_of(program: Program, temporary: Path) -> Usage:
    main, *workers = family_of(program.pid)
    # Unlike USS, it does not depend on how many pages a forked worker still shares.
    own_memory = Path(f"/proc/{program.pid}/status").read_text().split("RssAnon:")[1]
    return Usage(
        int(own_memory.split()[0]) / 1024,
        main.num_fds(),  # workers live for an epoch, with copies of these
        main.num_threads(),
        1 + len(workers),
        len(shared_memory_of(program.pid)),
        len(list(temporary.rglob("*"))),
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


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files with a short path, since it holds sockets."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        yield Path(folder)


def step_of(run: Run) -> int:
    """Return the last step in a run's log; -1 without one."""
    return max(run.losses, default=-1)


@pytest.mark.slow
def test_a_long_run_does_not_leak(labeled: Path, tmp_path: Path, temporary: Path) -> None:
    """It has many epochs, checkpoints and retrievals, and is killed in its first third."""
    num_steps, warm_up, interval = 900, 300, 100
    settings = f"max_duration={num_steps}ba", f"save_interval={interval}ba", f"retrieval.interval={interval}ba"
    settings += "global_train_batch_size=4", "student.depth=1", "train_loader.num_workers=1"
    settings += f"retrieval.{datasets_of(labeled)}", "retrieval.baselines=[]", "retrieval.at_start=false"
    run = Run(tmp_path / "run", labeled / "train", *settings, "callbacks.health.interval=100ba")
    command, options = train_command(run.arguments)[1:], {"ranks": 1, "environment": {"TMPDIR": str(temporary)}}
    shared_memory, usages = set[tuple[str, int]](), defaultdict[int, list[Usage]](list)
    with started_ranks(*command, **options) as [program]:
        wait_until(lambda: step_of(run) >= interval or program.poll() is not None, seconds=600)
        shared_memory |= shared_memory_of(program.pid)
    program.wait(timeout=30)
    left_by_kill = set(temporary.rglob("*"))
    with started_ranks(*command, **options) as [program]:
        while program.poll() is None:
            if warm_up < (step := step_of(run)) < num_steps - 1:  # after the last step the run shuts down
                with suppress(psutil.Error, OSError, IndexError):  # it has just ended
                    usages[(step - warm_up) * 4 // (num_steps - warm_up)].append(usage_of(program, temporary))
                    shared_memory |= shared_memory_of(program.pid)
            time.sleep(0.25)
        assert program.poll() == 0
    assert len(run.losses) == num_steps
    assert_nothing_grows(usages[0] + usages[1], usages[2] + usages[3])
    assert [path for path, inode in shared_memory if inode_of(path) == inode] == []
    left = {path.relative_to(temporary).parts[0] for path in set(temporary.rglob("*")) - left_by_kill}
    assert [name for name in left if not name.startswith("torchinductor_")] == []  # torch keeps its cache
