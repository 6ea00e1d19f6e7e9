"""Promise 10, the campaign: a run killed at any moment and started again ends like an undisturbed one."""

import random
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
    assert_same_student,
    checkpoints_of,
    has_trained,
    log_of,
    losses_of,
    started_ranks,
    student_of,
    train_command,
)
from programs.preloaded import Program

NUM_BATCHES = 24
NUM_KILLS = 50
POLL_SECONDS = 0.005
LOSS = "loss/train/total"


def quickstart(folder: Path, labeled: Path) -> list[str]:
    """The quickstart's teacher, student and data, for 24 batches of 8."""
    return [
        str(ROOT / "yamls" / "quickstart.yaml"),
        f"save_folder={folder}",
        f"retrieval.datasets.cifar10.root={labeled}",
        f"max_duration={NUM_BATCHES}ba",
        "scheduler.t_warmup=4ba",
        "global_train_batch_size=8",
        "precision=fp32",
        "retrieval.interval=8ba",
        "retrieval.baselines=[pixels]",
        "save_interval=3ba",
        "report=false",
    ]


@contextmanager
def started(arguments: list[str], ranks: int = 1) -> Iterator[list[Program]]:
    """Start a run, and kill all its processes at the end."""
    with started_ranks(*train_command(arguments)[1:], ranks=ranks) as programs:
        try:
            yield programs
        finally:
            kill_all(programs)


def kill_all(programs: list[Program]) -> None:
    """Kill ranks and workers at once, as a power failure does."""
    family = []
    for program in programs:
        if program.poll() is None:
            rank = psutil.Process(program.pid)
            family += [rank, *rank.children(recursive=True)]
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for program in programs:
        program.wait(timeout=30)


def run_to_the_end(arguments: list[str], ranks: int = 1) -> None:
    with started_ranks(*train_command(arguments)[1:], ranks=ranks) as programs:
        for program in programs:
            assert program.wait(timeout=300) == 0, program.stderr


# Given the run's folder and its running time in seconds, returns whether to kill it now.
Moment = Callable[[Path, float], bool]


def in_start_up(dice: random.Random) -> Moment:
    moment = dice.uniform(0, 3)
    return lambda folder, seconds: seconds >= moment or has_trained(folder)


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

    return after(lambda folder: batch in log_of(folder).get(LOSS, ()), wait)


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

    return after(lambda folder: batch in log_of(folder).get(LOSS, ()), wait)


MOMENTS = [in_start_up, in_training, in_a_checkpoint, in_retrieval]


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, labeled: Path) -> Callable[[int], Path]:
    """Return the folder of a run that is not killed, by its number of ranks."""
    folders: dict[int, Path] = {}

    def run(ranks: int) -> Path:
        if ranks not in folders:
            folders[ranks] = tmp_path_factory.mktemp("undisturbed")
            run_to_the_end(quickstart(folders[ranks], labeled), ranks)
        return folders[ranks]

    return run


CASES = [(number, ranks) for number in range(NUM_KILLS // 2) for ranks in (1, 2)]
SLOW = [(2, 1)]


@pytest.mark.parametrize(
    ("number", "ranks"),
    [pytest.param(*case, marks=pytest.mark.slow if case in SLOW else pytest.mark.campaign) for case in CASES],
)
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_weights(
    number: int, ranks: int, undisturbed: Callable[[int], Path], labeled: Path, tmp_path: Path
) -> None:
    expected = undisturbed(ranks)
    arguments = quickstart(tmp_path, labeled)
    moment = MOMENTS[number % len(MOMENTS)](random.Random(number))
    start = time.monotonic()
    with started(arguments, ranks) as programs:
        while not moment(tmp_path, time.monotonic() - start):
            assert [program.poll() for program in programs] == [None] * ranks, "the run ended before it was killed"
            time.sleep(POLL_SECONDS)
    run_to_the_end(arguments, ranks)
    if ranks == 1:
        assert losses_of(tmp_path) == losses_of(expected)
        assert_same_student(tmp_path, expected)
    else:
        assert_same_losses(losses_of(tmp_path), losses_of(expected), NUM_BATCHES)
        torch.testing.assert_close(student_of(tmp_path), student_of(expected))
    partial = [path.name for path in tmp_path.iterdir() if "partial" in path.name]
    assert partial == []
