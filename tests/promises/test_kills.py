"""Promise 10, the campaign: a run killed at any moment and started again ends like an undisturbed one."""

import random
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch

from helpers import (
    ROOT,
    assert_same_losses,
    assert_same_student,
    family_of,
    has_trained,
    losses_of,
    run_ranks,
    started_ranks,
    student_of,
    train_command,
)
from programs.preloaded import Program

NUM_BATCHES = 24
NUM_KILLS = 50
POLL_SECONDS = 0.005


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


def kill_all(programs: list[Program]) -> None:
    """Kill ranks and workers at once, as a power failure does."""
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
        run_ranks(*train_command(quickstart(folder, labeled))[1:], ranks=ranks)
        return folder

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
    command = train_command(quickstart(tmp_path, labeled))[1:]
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
    partial = [path.name for path in tmp_path.iterdir() if "partial" in path.name]
    assert partial == []
