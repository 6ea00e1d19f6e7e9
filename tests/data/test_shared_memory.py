"""Names in shared memory: they belong to one run, and are removed after it."""

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections import namedtuple
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
from streaming.base.shared import SharedMemory

from d2v_composer.builders.data import build_train_loader, read_train_index
from d2v_composer.config.load import load_config
from d2v_composer.data import streaming
from d2v_composer.data.streaming import Reservation, StreamingImages
from d2v_composer.system import files
from d2v_composer.system.errors import InputError
from helpers import NUM_IMAGES, small_run, wait_until
from streams import open_images, read_epoch

FORK = multiprocessing.get_context("fork")
MEMORY = Path("/dev/shm")
ALL = list(range(NUM_IMAGES))


@pytest.fixture
def images(many_shards: Path) -> Callable[[], StreamingImages]:
    """Make a data set of 96 samples."""
    return lambda: open_images(many_shards)


def files_of(number: int) -> set[str]:
    return {path.name.removeprefix(f"{number}_") for path in MEMORY.glob(f"{number}_*")}


def number_of(dataset: StreamingImages) -> int:
    return dataset._names.number


def start_together(images: Callable[[], StreamingImages], folder: Path, start: Barrier) -> None:
    tempfile.tempdir = str(folder)
    start.wait()
    for _ in range(2):
        assert read_epoch(images()) == ALL


def test_runs_that_start_at_the_same_time_get_different_names(
    images: Callable[[], StreamingImages], tmp_path: Path
) -> None:
    """Two runs with the same temporary folder, and six with their own."""
    folders = [tmp_path / name for name in ("common", "common", *"abcdef")]
    start = FORK.Barrier(len(folders))
    runs = [FORK.Process(target=start_together, args=(images, folder, start)) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        folder.mkdir(exist_ok=True)
        run.start()
    for run in runs:
        run.join(timeout=60)
    assert [run.exitcode for run in runs] == [0] * len(runs)


def test_names_are_removed_with_the_data_set(images: Callable[[], StreamingImages]) -> None:
    images()  # the first one starts Python's resource tracker
    open_files = len(os.listdir("/proc/self/fd"))
    dataset = images()
    number = number_of(dataset)
    dataset.load_state_dict(dataset.state_dict(0, from_beginning=True) | {"epoch": 0})
    dataset.load_state_dict(dataset.state_dict(0, from_beginning=True))
    assert read_epoch(dataset) == ALL
    assert {"in_use", "barrier", "next_epoch", "shard_states", "fetchers", "resume"} <= files_of(number)
    del dataset
    assert files_of(number) == set()
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_locks_are_beside_the_memory(images: Callable[[], StreamingImages]) -> None:
    """Ranks of one run may have different temporary folders."""
    dataset = images()
    assert read_epoch(dataset) == ALL
    with dataset.cache._lock():
        assert {"barrier_filelock", "cache_filelock"} <= files_of(number_of(dataset))


def make_and_wait(images: Callable[[], StreamingImages], send: Connection) -> None:
    dataset = images()
    worker = FORK.Process(target=time.sleep, args=(600,))
    worker.start()
    send.send((number_of(dataset), worker.pid))
    time.sleep(600)


def test_names_of_a_killed_run_are_removed_by_the_next_start(images: Callable[[], StreamingImages]) -> None:
    """But only once its last worker has ended."""
    receive, send = FORK.Pipe(duplex=False)
    run = FORK.Process(target=make_and_wait, args=(images, send))
    run.start()
    number, worker = receive.recv()
    run.kill()
    run.join()
    left = files_of(number)
    assert {"in_use", "shard_states"} <= left
    beside = images()
    assert number_of(beside) != number
    assert files_of(number) == left
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: number_of(images()) != number and not files_of(number), seconds=10)
    assert read_epoch(beside) == ALL


def test_names_that_another_user_left_stay(
    images: Callable[[], StreamingImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = MEMORY / "1000000_in_use"
    lock.touch()
    own_open = os.open

    def refuse(path: str | Path, *args: int) -> int:
        if Path(path) == lock:
            raise PermissionError(13, "Permission denied")
        return own_open(path, *args)

    monkeypatch.setattr(files.os, "open", refuse)
    try:
        assert read_epoch(images()) == ALL
        assert lock.exists()
    finally:
        lock.unlink()


def test_a_number_is_held_by_all_ranks() -> None:
    first = streaming._reserve()
    second = streaming._join(first.number)
    memory = SharedMemory(f"{first.number}_data", True, 8)
    second.memory.append(memory)
    first.release()
    streaming._remove_abandoned()
    assert files_of(second.number) == {"in_use", "data"}
    second.release()
    assert files_of(second.number) == set()


def test_draws_another_number_if_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([0, 0, 0, 1])
    monkeypatch.setattr(streaming.secrets, "randbelow", lambda _: next(drawn))
    held: list[Reservation] = [streaming._reserve()]
    try:
        held.append(streaming._reserve())
        assert [each.number for each in held] == [1_000_000, 1_000_001]
    finally:
        for each in held:
            each.release()


def test_locks_are_in_the_temporary_folder_if_shared_memory_is_not_made_of_files(
    images: Callable[[], StreamingImages],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As on macOS."""
    streaming._warn_of_no_folder.cache_clear()
    monkeypatch.setattr(streaming, "FOLDER", tmp_path / "no-such-folder")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dataset = images()
    lock = tmp_path / f"{number_of(dataset)}_in_use"
    assert lock.exists()
    assert read_epoch(dataset) == ALL
    assert "all runs on this machine must use the same temporary folder" in caplog.text
    del dataset
    assert not lock.exists()


Usage = namedtuple("Usage", ["total", "used", "free"])


def test_refuses_to_start_with_too_little_shared_memory(
    images: Callable[[], StreamingImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be killed by SIGBUS."""
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda _: Usage(16384, 0, 16384))
    before = set(MEMORY.iterdir())
    with pytest.raises(InputError) as caught:
        images()
    needed = streaming.shared_memory_needed(num_shards=32, num_samples=96)
    assert str(caught.value).startswith(f"/dev/shm: 16,384 of 16,384 bytes are free, training data needs {needed:,}: ")
    assert "docker run --shm-size=1m" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert set(MEMORY.iterdir()) - before == set()


def test_refuses_to_start_with_too_little_shared_memory_for_the_workers(
    small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for the data set, but not for the batches that are made in advance."""
    options = ("train_loader.num_workers=2", "train_loader.prefetch_factor=6")
    config = load_config(small_run(tmp_path, small_data, *options))
    monkeypatch.setattr(streaming.shutil, "disk_usage", lambda _: Usage(64 << 20, 60 << 20, 4 << 20))
    build_train_loader(config, read_train_index(config), 24, "bicubic")
    with pytest.raises(InputError, match=r"^/dev/shm: 4,194,304 of 67,108,864 bytes are free, .* needs 33,9"):
        build_train_loader(config, read_train_index(config), 224, "bicubic")  # 16 x 3 x 224 x 224 bytes, 14 times


def test_counts_the_shared_memory_of_the_papers_run() -> None:
    """On eight GPUs: 32 images of 224 pixels a rank, two batches in each of 64 workers and two in use per rank."""
    alone = streaming.shared_memory_needed(num_shards=1300, num_samples=1_281_167)
    assert alone == pytest.approx(8 * 1_281_167 + 25 * 1300, abs=100_000)
    batch_bytes = 32 * 3 * 224 * 224
    whole = streaming.shared_memory_needed(
        num_shards=1300, num_samples=1_281_167, ranks=8, workers=8, prefetch_factor=2, batch_bytes=batch_bytes
    )
    assert whole - alone == pytest.approx(8 * 18 * batch_bytes, rel=0.01)


def test_a_pickled_copy_reads_too(images: Callable[[], StreamingImages]) -> None:
    dataset = images()
    assert read_epoch(pickle.loads(pickle.dumps(dataset))) == ALL
    assert read_epoch(dataset) == ALL
