"""Epochs from a cache, filled from another folder as from a store: missing and corrupt shards, full disks, kills."""

import errno
import gc
import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import psutil
import pytest
from streaming import MDSWriter
from streaming.base.storage import LocalDownloader

from d2v_composer.data.streaming import StreamingImages
from d2v_composer.system.errors import InputError, ShardError
from d2v_composer.system.files import sole_user
from helpers import NUM_IMAGES, encoded_image, time_limit, wait_until, write_mds
from streams import open_batches, open_images, read_epoch

FORK = multiprocessing.get_context("fork")
ALL = list(range(NUM_IMAGES))
WORKERS = pytest.mark.parametrize("workers", [0, 2])


@pytest.fixture(scope="module")
def original(many_shards: Path) -> Path:
    return many_shards


@pytest.fixture
def remote(original: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return shutil.copytree(original, tmp_path / "remote")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """The log of this process and its workers."""
    path = tmp_path / "log"
    handler = logging.FileHandler(path)
    logging.getLogger("d2v_composer").addHandler(handler)
    yield path
    logging.getLogger("d2v_composer").removeHandler(handler)
    handler.close()


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def same_files(folder: Path, other: Path) -> bool:
    ours, theirs = ({file.name: file.read_bytes() for file in each.glob("*.mds")} for each in (folder, other))
    return ours == theirs


def size(folder: Path) -> int:
    """The bytes of all files."""
    total = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # evicted just now
            total += file.stat().st_size
    return total


@WORKERS
def test_repairs_a_corrupt_cache(original: Path, tmp_path: Path, workers: int, log: Path) -> None:
    cache = shutil.copytree(original, tmp_path / "cache")
    flip_bit(cache / "shard.00003.mds")
    truncate(cache / "shard.00004.mds")
    (cache / "shard.00005.mds").unlink()
    (cache / "shard.00005.mds.7-7.partial").write_bytes(b"left by a killed process")
    (cache / "shard.00005.mds.7-7.partial.aB3dE5g7").write_bytes(b"boto's")
    assert read_epoch(open_images(cache, original), workers) == ALL
    assert same_files(cache, original)
    assert not list(cache.glob("*.partial*"))
    said = log.read_text()
    assert "shard.00003.mds: its content has changed (xxh64): fetched again" in said
    assert "shard.00004.mds: has 16" in said
    assert said.count("fetched again") == 2


DAMAGES = {"missing": Path.unlink, "truncated": truncate, "corrupt": flip_bit}
TRUNCATED, CORRUPT = "bytes, the index says", r"its content has changed \(xxh64\)"


@WORKERS
@pytest.mark.parametrize(
    ("damage", "cause"), [("missing", "No such file"), ("truncated", TRUNCATED), ("corrupt", CORRUPT)]
)
def test_stops_at_a_shard_that_is_damaged_in_the_store(
    remote: Path, tmp_path: Path, damage: str, cause: str, workers: int
) -> None:
    DAMAGES[damage](remote / "shard.00007.mds")
    with (
        pytest.raises(ShardError, match=rf"remote/shard\.00007\.mds: the shard cannot be fetched: .*{cause}"),
        time_limit(40),
    ):
        read_epoch(open_images(tmp_path / "cache", remote), workers)
    assert not (tmp_path / "cache" / "shard.00007.mds").exists()


@WORKERS
@pytest.mark.parametrize(
    ("damage", "cause"), [("missing", "the shard is missing"), ("truncated", TRUNCATED), ("corrupt", CORRUPT)]
)
def test_verifies_a_local_data_set_but_never_changes_it(remote: Path, damage: str, cause: str, workers: int) -> None:
    shard = remote / "shard.00007.mds"
    DAMAGES[damage](shard)
    before = shard.read_bytes() if shard.exists() else None
    for num_workers in (workers, 0):  # the second data set does not trust the first one's cache
        with pytest.raises(ShardError, match=rf"shard\.00007\.mds: .*{cause}"):
            read_epoch(open_images(remote), num_workers)
        assert (shard.read_bytes() if shard.exists() else None) == before


def test_fetches_again_a_shard_deleted_in_the_middle_of_an_epoch(original: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    dataset = open_images(cache, original)
    seen = []
    for sample in dataset:
        seen.append(sample["sample_id"])
        if len(seen) == 40:
            for path in cache.glob("*.mds"):
                path.unlink()
    assert sorted(seen) == ALL
    assert read_epoch(dataset) == ALL  # also the shards that were not needed again
    assert dataset.cache_usage == size(cache)


def test_workers_end_when_their_run_is_killed(original: Path, tmp_path: Path) -> None:
    """Here while they wait for a store. Otherwise they would hold the cache's lock."""
    cache = tmp_path / "cache"
    cache.mkdir()
    shutil.copy(original / "index.json", cache)
    reading: SimpleQueue[int] = FORK.SimpleQueue()
    get_item = StreamingImages.get_item

    def get_item_and_tell(dataset: StreamingImages, sample_id: int) -> dict[str, Any]:
        reading.put(os.getpid())
        return get_item(dataset, sample_id)

    def run() -> None:
        with open_batches(open_images(cache, original), workers=2) as batches:
            next(batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalDownloader, "download", lambda *_: time.sleep(600))
        patch.setattr(StreamingImages, "get_item", get_item_and_tell)
        process = FORK.Process(target=run)
        process.start()
        try:
            with time_limit(40):
                workers = [psutil.Process(pid) for pid in {reading.get(), reading.get()}]
        finally:
            process.kill()
            process.join()
    assert len(workers) == 2
    assert process.pid not in {worker.pid for worker in workers}
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert not alive
    assert read_epoch(open_images(cache, original)) == ALL


def read_a_sample_and_wait(cache: Path, remote: Path, send: Connection) -> None:
    dataset = open_images(cache, remote)
    send.send(next(iter(dataset))["sample_id"])
    time.sleep(600)


def test_two_runs_cannot_share_a_cache(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2v_composer.data.shards.LAST_USER_LEAVES", 0.2)
    cache = tmp_path / "cache"
    receive, send = FORK.Pipe(duplex=False)
    other = FORK.Process(target=read_a_sample_and_wait, args=(cache, original, send))
    other.start()
    try:
        assert receive.recv() in ALL
        with pytest.raises(InputError, match="cache: another run keeps its shards there: give each run its own folder"):
            open_images(cache, original)
        assert read_epoch(open_images(tmp_path / "elsewhere", original)) == ALL
    finally:
        other.kill()
        other.join()
    assert read_epoch(open_images(cache, original)) == ALL
    first, second = open_images(original), open_images(original)  # a local data set can be shared
    assert read_epoch(first) == read_epoch(second) == ALL


def test_reads_in_this_process_and_then_in_workers(original: Path, tmp_path: Path) -> None:
    """A forked worker cannot use a lock that this process made before."""
    dataset = open_images(tmp_path / "cache", original)
    assert read_epoch(dataset) == ALL
    assert read_epoch(dataset, workers=2) == ALL
    for path in (tmp_path / "cache").glob("*.mds"):
        path.unlink()
    assert read_epoch(dataset, workers=2) == ALL


@WORKERS
def test_a_newer_data_set_of_the_process_takes_the_cache_over(original: Path, tmp_path: Path, workers: int) -> None:
    """As in a notebook whose cell is run again: the newer one is made while the variable holds the older one."""
    cache, limit = tmp_path / "cache", 30_000
    older = open_images(cache, original, cache_limit=limit)
    with open_batches(older, workers) as batches:
        next(batches)
        with time_limit(40):
            newer = open_images(cache, original, cache_limit=limit)
            assert read_epoch(newer, workers) == ALL
        assert newer.cache_usage == size(cache) <= limit
        with pytest.raises(ShardError, match="cache: a newer data set of this process uses the folder now"):
            list(batches)
    assert newer.cache_usage == size(cache)
    del older, batches
    assert read_epoch(newer) == ALL


def test_a_data_set_that_cannot_be_made_holds_nothing(original: Path, tmp_path: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    with pytest.raises(ValueError, match="cache_limit must be at least") as caught:
        open_images(tmp_path / "cache", original, cache_limit=25_000)
    assert caught.tb is not None  # a notebook keeps it
    with sole_user(tmp_path / "cache" / ".in_use") as is_free:
        assert is_free
    assert set(Path("/dev/shm").iterdir()) - before == set()


@WORKERS
def test_stops_when_the_disk_is_full(original: Path, tmp_path: Path, workers: int) -> None:
    dataset = open_images(tmp_path / "cache", original, timeout=60)
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, largest[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(ShardError, match=rf"shard\.\d+\.mds: .*{os.strerror(errno.EFBIG)}"), time_limit(40):
            read_epoch(dataset, workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, largest)
    # The thread that fetches ahead may not be done yet.
    wait_until(lambda: not list((tmp_path / "cache").glob("*.partial*")), seconds=20)


def test_stops_when_a_worker_is_killed(original: Path, tmp_path: Path) -> None:
    """The error is torch's: of the dead process, or of the broken connection of a batch under way."""
    with open_batches(open_images(tmp_path / "cache", original), workers=2) as batches:
        next(batches)
        gc.collect()  # torch raises the error at any moment, but not while an older data set is removed
        os.kill(batches._workers[1].pid, signal.SIGKILL)  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises((RuntimeError, ConnectionError, EOFError)) as caught, time_limit(40):
            list(batches)
    dead = r"DataLoader worker .* (killed by signal|exited unexpectedly)"
    assert isinstance(caught.value, (ConnectionError, EOFError)) or re.search(dead, str(caught.value))


def test_stops_when_the_store_sends_nothing(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = open_images(tmp_path / "cache", original, timeout=0.1)
    monkeypatch.setattr(LocalDownloader, "download", lambda *_: None)
    with pytest.raises(ShardError, match="cannot be fetched: the store sent nothing"):
        dataset.prepare_shard(7)


def test_reads_every_sample_if_the_workers_do_not_divide_the_epoch(tmp_path: Path) -> None:
    dataset = open_images(write_mds(tmp_path / "data", [encoded_image(i) for i in range(97)]))
    for _ in range(2):
        assert read_epoch(dataset, workers=2) == list(range(97))


def test_verifies_shards_without_hashes_by_their_size(tmp_path: Path) -> None:
    data = write_mds(tmp_path / "data", [encoded_image(i) for i in ALL])
    assert not any(shard["raw_data"]["hashes"] for shard in json.loads((data / "index.json").read_text())["shards"])
    assert read_epoch(open_images(data)) == ALL
    truncate(data / "shard.00001.mds")
    with pytest.raises(ShardError, match=TRUNCATED):
        read_epoch(open_images(data))


def test_reads_compressed_shards(tmp_path: Path) -> None:
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    columns = {"image": "bytes"}
    with MDSWriter(out=str(remote), columns=columns, size_limit=4096, compression="zstd", hashes=["sha1"]) as writer:
        for i in ALL:
            writer.write({"image": encoded_image(i)})
    dataset = open_images(cache, remote)
    assert read_epoch(dataset) == ALL
    assert not list(cache.glob("*.zstd"))
    assert dataset.cache_usage == size(cache)
    del dataset

    flip_bit(cache / "shard.00003.mds")
    assert read_epoch(open_images(cache, remote)) == ALL
    flip_bit(remote / "shard.00003.mds.zstd")
    (cache / "shard.00003.mds").unlink()
    with pytest.raises(ShardError, match=r"shard\.00003\.mds\.zstd: .*its content has changed \(sha1\)"):
        read_epoch(open_images(cache, remote))


ARGUMENTS_OF_STREAMING = (
    "streams split validate_hash download_retry download_timeout keep_zip sampling_method sampling_granularity "
    "batching_method replication allow_unsafe_types stream_name stream_config"
)


@pytest.mark.parametrize("name", ARGUMENTS_OF_STREAMING.split())
def test_refuses_an_argument_of_streaming_that_it_does_not_support(original: Path, name: str) -> None:
    options: dict[str, Any] = {name: "anything"}
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        open_images(original, **options)


def test_refuses_an_epoch_of_more_samples_than_there_are(original: Path) -> None:
    with pytest.raises(ValueError, match=f"epoch_size must be at most the {NUM_IMAGES} samples, got 97"):
        open_images(original, batch_size=1, epoch_size=97)
