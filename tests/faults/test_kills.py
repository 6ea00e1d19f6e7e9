"""A run killed at any moment and started again ends like an undisturbed one."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch

from helpers import (
    ROOT,
    assert_same_losses,
    checkpoints_of,
    command_environment,
    inode_of,
    losses_of,
    run_command,
    shared_memory_of,
    small_run,
    student_of,
    train_command,
)

NUM_BATCHES = 24
NUM_KILLS = 50
POLL_SECONDS = 0.001


def quickstart(folder: Path, labelled: Path) -> list[str]:
    """The quickstart's teacher, student and data, for 24 batches of 8."""
    return [
        str(ROOT / "yamls" / "quickstart.yaml"),
        f"save_folder={folder}",
        f"retrieval.datasets.cifar10.root={labelled}",
        f"max_duration={NUM_BATCHES}ba",
        "scheduler.t_warmup=4ba",
        "global_train_batch_size=8",
        "precision=fp32",
        "retrieval.interval=8ba",
        "retrieval.references=[pixels]",
        "save_interval=3ba",
        "report=false",
    ]


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a command in a new session, and kill all its processes at the end."""
    process = subprocess.Popen(
        command,
        env=command_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Kill launcher, ranks and workers at once, as a power failure does."""
    if process.poll() is not None:
        return
    family = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def log_of(folder: Path) -> str:
    path = folder / "log.jsonl"
    return path.read_text() if path.exists() else ""


# Given the run's folder and its running time in seconds, returns whether to kill it now.
Moment = Callable[[Path, float], bool]


def in_start_up(dice: random.Random) -> Moment:
    moment = dice.uniform(0, 10)
    return lambda folder, seconds: seconds >= moment or "loss" in log_of(folder)


def after(holds: Callable[[Path], bool], wait: float) -> Moment:
    """Some milliseconds after a condition begins to hold."""

    def has_come(folder: Path, seconds: float) -> bool:
        if not holds(folder):
            return False
        time.sleep(wait)
        return True

    return has_come


def in_training(dice: random.Random) -> Moment:
    """Some milliseconds into a random batch."""
    batch, wait = dice.randrange(1, NUM_BATCHES), dice.uniform(0, 0.2)

    return after(lambda folder: f'"step": {batch},' in log_of(folder), wait)


def in_a_checkpoint(dice: random.Random) -> Moment:
    """While a checkpoint is written."""
    number, wait = dice.randrange(1, NUM_BATCHES // 3), dice.uniform(0, 0.03)
    seen: set[str] = set()

    def are_enough(folder: Path) -> bool:
        seen.update(checkpoints_of(folder))
        return len(seen) >= number

    return after(are_enough, wait)


def in_retrieval(dice: random.Random) -> Moment:
    """After the loss of a batch that ends with a retrieval, and before its result."""
    batch, wait = dice.choice([7, 15, 23]), dice.uniform(0, 0.5)

    return after(lambda folder: f'"step": {batch}, "loss' in log_of(folder), wait)


MOMENTS = [in_start_up, in_training, in_a_checkpoint, in_retrieval]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, labelled: Path) -> Callable[[int], Path]:
    """Return the folder of a run that is not killed, by its number of ranks."""
    folders: dict[int, Path] = {}

    def run(ranks: int) -> Path:
        if ranks not in folders:
            folders[ranks] = tmp_path_factory.mktemp("undisturbed")
            ended = run_command(*train_command(quickstart(folders[ranks], labelled), ranks), timeout=300)
            assert ended.returncode == 0, ended.stderr
        return folders[ranks]

    return run


CASES = [(number, ranks) for number in range(NUM_KILLS // 2) for ranks in (1, 2)]
FAST = [(2, 1)]


@pytest.mark.parametrize(
    ("number", "ranks"), [pytest.param(*case, marks=() if case in FAST else pytest.mark.campaign) for case in CASES]
)
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_weights(
    number: int, ranks: int, undisturbed: Callable[[int], Path], labelled: Path, tmp_path: Path
) -> None:
    expected = undisturbed(ranks)
    command = train_command(quickstart(tmp_path, labelled), ranks)
    moment = MOMENTS[number % len(MOMENTS)](random.Random(number))
    start = time.monotonic()
    with started(command) as process:
        while not moment(tmp_path, time.monotonic() - start):
            assert process.poll() is None, "the run ended before it was killed"
            time.sleep(POLL_SECONDS)
    again = run_command(*command, timeout=300)
    assert again.returncode == 0, again.stderr
    ours, theirs = student_of(tmp_path), student_of(expected)
    assert ours.keys() == theirs.keys()
    if ranks == 1:
        assert losses_of(tmp_path) == losses_of(expected)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    else:
        assert_same_losses(losses_of(tmp_path), losses_of(expected), NUM_BATCHES)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name])
    partial = [path.name for path in tmp_path.iterdir() if "partial" in path.name]
    assert partial == []


def test_the_next_start_removes_a_killed_runs_shared_memory(small_data: Path, tmp_path: Path) -> None:
    """A running run keeps its own."""

    def endless(name: str) -> list[str]:
        return train_command(small_run(tmp_path / name, small_data, "max_duration=100000ba", "save_interval=1000ba"))

    with started(endless("beside")) as beside, started(endless("killed")) as killed:
        for process, name in ((beside, "beside"), (killed, "killed")):
            while '"step": 2,' not in log_of(tmp_path / name):
                assert process.poll() is None
                time.sleep(0.1)
        kept, left = shared_memory_of(beside.pid), shared_memory_of(killed.pid)
        assert kept
        assert left
        assert kept.isdisjoint(left)
        kill_all(killed)
        assert all(inode_of(path) == inode for path, inode in left)  # not removed yet
        ended = run_command(*train_command(small_run(tmp_path / "next", small_data)))
        assert ended.returncode == 0, ended.stderr
        assert [path for path, inode in left if inode_of(path) == inode] == []
        assert all(inode_of(path) == inode for path, inode in kept)
        assert beside.poll() is None


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.campaign)])
def test_a_run_ends_when_one_of_its_ranks_is_killed(victim: int, small_data: Path, tmp_path: Path) -> None:
    """The other rank does not wait, and the launcher names the killed one."""
    arguments = small_run(tmp_path, small_data, "max_duration=100000ba", "save_interval=20ba")
    launcher = subprocess.Popen(
        train_command(arguments, ranks=2),
        env=command_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 90
    while '"step": 50,' not in log_of(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ranks = psutil.Process(launcher.pid).children()
    assert len(ranks) == 2
    ranks[victim].kill()
    output, _ = launcher.communicate(timeout=45)
    assert psutil.wait_procs(ranks, timeout=1)[1] == []
    assert launcher.returncode != 0
    assert f"Rank {victim} crashed with exit code -9" in output
