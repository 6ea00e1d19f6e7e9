"""Promise 26: the same command after a loss of power at any moment; tests/README.md has the model."""

import os
import shutil
import time
from pathlib import Path

import pytest

from helpers import log_of, run_training, small_run
from power.recorder import IS_AVAILABLE
from power.trial import CASES, Inputs, converting, record_trial

pytestmark = pytest.mark.skipif(not IS_AVAILABLE, reason="strace cannot trace here")
RESUMED = ("convert-images", "embed npy", "embed Parquet", "train", "distill", "finetune")
# So many states are drawn, of which some are alike.
NUM_STATES = 3000
# In so many, the command runs again. The ablations take 15 seconds: each row is a program.
NUM_REPEATS = dict.fromkeys(CASES, 300) | {"ablations": 20}
# A factor of these numbers of repeats.
FACTOR = float(os.environ.get("POWER", 1))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.slow
def test_a_small_conversion_survives_a_loss_of_power(inputs: Inputs, tmp_path: Path) -> None:
    """Promise 26: this is the smallest of the campaign's cases; in four states, the command runs again."""
    trial = record_trial(converting(6), inputs, tmp_path)
    for number, state in enumerate(trial.states(100)):
        problem = trial.judge(state, repeats=number % 25 == 0)
        assert problem is None, trial.tell(state, problem)


def test_a_run_goes_on_with_the_lock_and_the_log_that_were_left(
    uninterrupted: Path, small_data: Path, tmp_path: Path
) -> None:
    """Promise 26: the lock's file has zeros, and the log ends within a line."""
    folder = shutil.copytree(uninterrupted, tmp_path / "run", symlinks=True)
    (folder / ".in_use").write_bytes(bytes(20))
    with (folder / "log.jsonl").open("ab") as log:
        log.write(b'{"step": 14, "loss' + bytes(9))
    run_training(*small_run(folder, small_data, "max_duration=16ba"))
    logged = log_of(folder)
    assert sorted(logged["loss/train/total"]) == list(range(16))
    assert all({14, 15} <= steps.keys() for steps in logged.values() if 13 in steps), logged


@pytest.mark.campaign
@pytest.mark.parametrize(("name", "resumes"), [*((name, False) for name in CASES), *((name, True) for name in RESUMED)])
def test_a_command_survives_a_loss_of_power(name: str, resumes: bool, inputs: Inputs, tmp_path: Path) -> None:
    """Promises 9, 10, 12, 17, 21 and 26: the disk may be in any of many states; the next call gives no wrong result."""
    start = time.monotonic()
    trial = record_trial(CASES[name], inputs, tmp_path, resumes=resumes)
    counts, failures = list[int](), []
    for limit, repeats in ((NUM_STATES, False), (int(NUM_REPEATS[name] * FACTOR), True)):
        counts.append(0)
        for state in trial.states(limit):
            counts[-1] += 1
            if problem := trial.judge(state, repeats=repeats):
                failures.append((state, problem))
    about = (
        f"{name}{', resumed' * resumes}: {len(trial.operations)} operations, {counts[0]} states, {counts[1]} repeats"
    )
    print(f"{about}, {len(failures)} failures, {time.monotonic() - start:.0f} s", flush=True)
    assert not failures, trial.tell(*min(failures, key=lambda failure: (len(failure[0].losses), failure[0].number)))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_flush_that_is_taken_out_is_found(name: str, inputs: Inputs, tmp_path: Path) -> None:
    """Promise 26: without the last flush of a file or of a folder, some state has lost or torn what an ended
    command made.
    """
    trial = record_trial(CASES[name], inputs, tmp_path)
    flushes = [
        (i, operation.path == "." or (trial.out / operation.path).is_dir())
        for i, operation in enumerate(trial.operations)
        if operation.kind == "sync" and not operation.path.endswith("log.jsonl")
    ]
    for kind in (False, True):
        last = max(i for i, is_folder in flushes if is_folder == kind)
        without = trial._replace(operations=[*trial.operations[:last], *trial.operations[last + 1 :]])
        assert any(without.judge(state, repeats=False) for state in without.states(200))
