"""The shards of a cache: claims, room, eviction, fetching ahead, and threads that wait for each other."""

import logging
import os
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from streaming.base.storage import LocalDownloader

from d2v_composer.data import shards
from d2v_composer.data.shards import FEWEST_AHEAD, Claim, Lookahead, ShardState
from d2v_composer.system.errors import InputError, ShardError
from helpers import NUM_IMAGES, wait_until
from streams import open_images, read_epoch

ALL = list(range(NUM_IMAGES))


@pytest.fixture(scope="module")
def original(many_shards: Path) -> Path:
    return many_shards


def size(folder: Path) -> int:
    """The bytes of all files."""
    total = 0
    for file in folder.iterdir():
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # evicted just now
            continue
    return total


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_limit_holds_on_the_disk(original: Path, tmp_path: Path, workers: int) -> None:
    # The cache is full of shards of an earlier run, one of them corrupt.
    cache, limit = shutil.copytree(original, tmp_path / "cache"), 27_000
    for path in sorted(cache.glob("*.mds"))[4:]:
        path.unlink()
    (cache / "shard.00002.mds").write_bytes(bytes((cache / "shard.00002.mds").stat().st_size))
    dataset = open_images(cache, original, cache_limit=limit)
    largest, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            largest[0] = max(largest[0], size(cache))
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(2):
            assert read_epoch(dataset, workers) == ALL
    finally:
        stop.set()
        watcher.join()
    assert limit / 2 < largest[0] <= limit
    assert dataset.cache_usage == size(cache)


def test_evicts_down_to_the_limit(original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = shutil.copytree(original, tmp_path / "cache")
    (cache / "shard.00004.mds").write_bytes(b"truncated")
    with caplog.at_level(logging.WARNING):
        dataset = open_images(cache, original, cache_limit=30_000)
    assert dataset.cache_usage == size(cache)
    assert "cache_limit 30000 is less than the shards that are mixed at a time, about 1065" in caplog.text
    assert read_epoch(dataset) == ALL
    assert size(cache) <= 30_000
    assert dataset.cache_usage == size(cache)


def test_only_a_cache_has_a_limit(original: Path, tmp_path: Path) -> None:
    data = shutil.copytree(original, tmp_path / "data")
    before = {file.name: file.read_bytes() for file in data.iterdir()}
    with pytest.raises(ValueError, match="cache_limit is for a remote data set"):
        open_images(data, cache_limit=30_000)
    with pytest.raises(ValueError, match="remote must be another folder than local"):
        open_images(data, data, cache_limit=30_000)
    with pytest.raises(ValueError, match="cache_limit must be at least 25490 bytes, the index and four shards"):
        open_images(tmp_path / "cache", data, cache_limit=25_000)
    assert {file.name: file.read_bytes() for file in data.iterdir()} == before


def test_evicts_no_shard_that_is_fetched_or_wanted_and_last_the_shard_used_last(original: Path, tmp_path: Path) -> None:
    dataset = open_images(shutil.copytree(original, tmp_path / "cache"), original, cache_limit=200_000)
    states = dataset.cache.states
    assert set(states.numpy().tolist()) == {ShardState.UNVERIFIED}
    assert states.coldest(wanted=30) == 0
    assert dataset.cache.claim(0) is Claim.FETCH
    assert states.coldest(wanted=1) == 2
    dataset.cache.release(0)
    for sample_id in (0, 40, 90):
        dataset[sample_id]
    assert states.coldest(wanted=1) == 2  # the shards of an earlier run come before those used in this one
    dataset[0]
    for shard_id in np.flatnonzero(states.are(ShardState.UNVERIFIED)):
        states[int(shard_id)] = ShardState.ABSENT
    assert states.coldest(wanted=5) == dataset.spanner[40][0]


def test_fetches_several_shards_ahead_but_not_more_than_the_machine_may(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which they are needed. Two processes share the number."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    dataset = open_images(tmp_path / "cache", original, timeout=20)
    begun: list[str] = []
    may_end = threading.Event()
    copy = LocalDownloader.download

    def download(self: LocalDownloader, address: str, *rest: Any) -> None:
        begun.append(address)
        assert may_end.wait(20)
        copy(self, address, *rest)

    monkeypatch.setattr(LocalDownloader, "download", download)
    needed = list(dict.fromkeys(dataset.spanner[i][0] for i in ALL))
    both = [Lookahead(dataset.cache, lambda i: dataset.spanner[i][0], np.array(ids), 1024) for ids in (ALL, ALL)]
    for ahead in both:
        ahead.start()
    wait_until(lambda: len(begun) == FEWEST_AHEAD)
    time.sleep(0.2)
    assert sorted(begun) == [dataset.stream._address(dataset.shards[i].raw_data) for i in needed[:FEWEST_AHEAD]]
    assert dataset.cache.claim(needed[-1]) is Claim.FETCH  # a thread that needs a shard now does not have to wait
    dataset.cache.release(needed[-1])
    may_end.set()
    wait_until(lambda: all(dataset.cache.is_here(i) for i in needed))
    for ahead in both:
        ahead.stop(wait=True)
    assert len(begun) == len(needed)


def test_waiting_threads_leave_the_lock_alone(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both those that wait for another thread's shard and those that wait for room."""
    dataset = open_images(tmp_path / "cache", original, cache_limit=27_000)
    cache = dataset.cache
    claimed = [i for i in range(8) if cache.claim(i) is Claim.FETCH]
    assert claimed == list(range(len(claimed)))
    assert 3 < len(claimed) < 8  # there is no room for the others
    acquired: list[int] = []
    acquire = FileLock.acquire
    checked: list[int] = []
    is_abandoned = cache.states.is_abandoned

    def acquire_and_count(self: FileLock, *args: Any, **kwargs: Any) -> Any:
        acquired.append(threading.get_native_id())
        return acquire(self, *args, **kwargs)

    def check_and_count(shard_id: int) -> bool:
        checked.append(shard_id)
        return is_abandoned(shard_id)

    monkeypatch.setattr(shards, "CHECK_SECONDS", 0.1)
    monkeypatch.setattr(FileLock, "acquire", acquire_and_count)
    monkeypatch.setattr(cache.states, "is_abandoned", check_and_count)
    waiting = [threading.Thread(target=cache.prepare, args=(i % 8,), daemon=True) for i in range(32)]
    for thread in waiting:
        thread.start()
    wait_until(lambda: len(set(checked)) == 8)  # each shard is waited for, and its thread was looked for
    assert acquired == []
    for shard_id in claimed:
        cache.release(shard_id)
    for thread in waiting:
        thread.join(20)
    assert not any(thread.is_alive() for thread in waiting)
    assert set(cache.states.numpy()[:8].tolist()) <= {ShardState.VERIFIED, ShardState.ABSENT}  # read, or evicted since
    assert acquired != []


def test_a_newer_data_set_waits_for_fetches_of_the_older_one(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2v_composer.data.shards.LAST_USER_LEAVES", 0.2)
    older = open_images(tmp_path / "cache", original)
    download, may_end = LocalDownloader.download, threading.Event()
    monkeypatch.setattr(LocalDownloader, "download", lambda *args: may_end.wait(20) and download(*args))
    fetch = threading.Thread(target=older.prepare_shard, args=(7,))
    fetch.start()
    wait_until(lambda: older.cache.states.are_being_fetched().any())
    with pytest.raises(InputError, match="cache: another data set of this process still fetches shards there"):
        open_images(tmp_path / "cache", original)
    may_end.set()
    fetch.join()
    assert read_epoch(older) == ALL  # the newer one was never made
    assert read_epoch(open_images(tmp_path / "cache", original)) == ALL


def test_waiting_threads_learn_that_a_shard_was_given_up(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three threads want one shard of an unreachable store: one retries, the others try at most once."""
    dataset = open_images(tmp_path / "cache", original, timeout=1)
    started, attempts = [], []

    def download(*_: object) -> None:
        attempts.append(threading.get_ident())
        while len(started) < 3:
            time.sleep(0.005)
        raise ConnectionError("connection refused")

    monkeypatch.setattr(LocalDownloader, "download", download)
    failures: list[str] = []

    def fetch() -> None:
        started.append(None)
        try:
            dataset.prepare_shard(7)
        except ShardError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=fetch, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    *others, most = sorted(Counter(attempts).values())
    assert most > 2
    assert set(others) <= {1}
    assert len(failures) == 3
    assert all("shard.00007.mds: the shard cannot be fetched: connection refused" in failure for failure in failures)


def killed_process() -> tuple[int, int]:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid, ended.pid


def ended_thread() -> tuple[int, int]:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()
    assert thread.native_id is not None
    return os.getpid(), thread.native_id


@pytest.mark.parametrize("fetcher", [killed_process, ended_thread])
def test_takes_over_a_shard_whose_process_or_thread_ended_while_fetching(
    original: Path, tmp_path: Path, fetcher: Callable[[], tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "CHECK_SECONDS", 0.1)
    dataset = open_images(tmp_path / "cache", original, timeout=20)
    assert dataset.cache.claim(7) is Claim.FETCH
    dataset.cache.states._fetchers[14:16] = fetcher()
    dataset.prepare_shard(7, blocking=False)  # does not wait
    assert not (tmp_path / "cache" / "shard.00007.mds").exists()
    assert read_epoch(dataset) == ALL
    assert dataset.cache_usage == size(tmp_path / "cache")


def test_a_file_that_a_killed_process_fetched_is_verified_before_it_is_read(original: Path, tmp_path: Path) -> None:
    """The process was killed after it moved the file to its place, and before it released the shard."""
    dataset = open_images(tmp_path / "cache", original)
    assert dataset.cache.claim(7) is Claim.FETCH
    (tmp_path / "cache" / "shard.00007.mds").write_bytes(bytes((original / "shard.00007.mds").stat().st_size))
    dataset.cache.states._fetchers[14:16] = killed_process()
    dataset.cache._release_if_abandoned(7)
    assert dataset.cache.states[7] == ShardState.UNVERIFIED
    assert read_epoch(dataset) == ALL
    assert dataset.cache_usage == size(tmp_path / "cache")


def test_a_failed_shard_is_not_fetched_ahead_and_is_retried_when_needed(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_images(tmp_path / "cache", original, timeout=0.01)
    with monkeypatch.context() as patch:
        patch.setattr(LocalDownloader, "download", lambda *_: None)
        with pytest.raises(ShardError):
            dataset.prepare_shard(7)
    assert dataset.cache.states[7] == ShardState.FAILED
    assert dataset.cache.claim(7, ahead=True) is Claim.SKIP
    assert dataset.cache.claim(7) is Claim.FETCH
    assert dataset.cache.states[7] == ShardState.RETRYING
    dataset.cache.fetch(7)
    assert dataset.cache.is_here(7)
