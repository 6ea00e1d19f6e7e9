"""Shards that are lost, damaged or evicted, in a cache that is filled from another folder as from a store."""

import errno
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any

import azure.core.exceptions
import numpy as np
import psutil
import pytest
import requests
from botocore.exceptions import ClientError, NoCredentialsError
from filelock import FileLock
from streaming import MDSWriter
from streaming.base.storage import LocalDownloader
from torch.utils.data import DataLoader

from d2v_composer.data.augmentation import RandomResizedCropFlip
from d2v_composer.data.lookahead import Lookahead
from d2v_composer.data.shard_cache import FEWEST_AHEAD, Claim, ShardState
from d2v_composer.data.streaming_images import StreamingImages
from d2v_composer.data.verified_stream import ShardError
from d2v_composer.system import retry as retry_module
from d2v_composer.system.errors import InputError
from d2v_composer.system.file_locks import sole_user
from d2v_composer.system.retry import is_lasting, retry
from helpers import encoded_image, time_limit, write_mds

NUM_SAMPLES = 96
WORKERS = pytest.mark.parametrize("workers", [0, 2])


@pytest.fixture(scope="module")
def original(many_shards: Path) -> Path:
    return many_shards


@pytest.fixture
def remote(original: Path, tmp_path: Path) -> Path:
    """A copy of its own."""
    return shutil.copytree(original, tmp_path / "remote")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_module, "FIRST_PAUSE", 0.01)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """What this process and its workers log."""
    path = tmp_path / "log"
    handler = logging.FileHandler(path)
    logging.getLogger("d2v_composer").addHandler(handler)
    yield path
    logging.getLogger("d2v_composer").removeHandler(handler)
    handler.close()


def images(
    local: Path, remote: Path | None = None, cache_limit: int | None = None, timeout: float = 1
) -> StreamingImages:
    return StreamingImages(
        local=local,
        remote=None if remote is None else str(remote),
        batch_size=16,
        transform=RandomResizedCropFlip(24),
        seed=5,
        cache_limit=cache_limit,
        timeout=timeout,
    )


def epoch(dataset: StreamingImages, workers: int) -> list[int]:
    """The sample ids of an epoch, in no order; it must not hang."""
    batches = iter(loader(dataset, workers))
    try:
        with time_limit(30):
            return sorted(i for batch in batches for i in batch["sample_id"].tolist())
    finally:
        if workers:  # now, not when a traceback lets go of it
            batches._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]


def loader(dataset: StreamingImages, workers: int) -> DataLoader:
    return DataLoader(dataset, batch_size=16, num_workers=workers, timeout=20 if workers else 0)


ALL = list(range(NUM_SAMPLES))


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def same_files(folder: Path, other: Path) -> bool:
    ours, theirs = ({file.name: file.read_bytes() for file in each.glob("*.mds")} for each in (folder, other))
    return ours == theirs


@WORKERS
def test_a_damaged_cache_is_healed(original: Path, tmp_path: Path, workers: int, log: Path) -> None:
    cache = shutil.copytree(original, tmp_path / "cache")
    flip_bit(cache / "shard.00003.mds")
    cut(cache / "shard.00004.mds")
    (cache / "shard.00005.mds").unlink()
    (cache / "shard.00005.mds.7-7.partial").write_bytes(b"what a killed process left")
    (cache / "shard.00005.mds.7-7.partial.aB3dE5g7").write_bytes(b"boto's")
    assert epoch(images(cache, original), workers) == ALL
    assert same_files(cache, original)
    assert not list(cache.glob("*.partial*"))
    said = log.read_text()
    assert "shard.00003.mds: its content has changed (xxh64): fetched again" in said
    assert "shard.00004.mds: has 16" in said
    assert said.count("fetched again") == 2


@WORKERS
@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (Path.unlink, "No such file"),
        (cut, "bytes, the index says"),
        (flip_bit, r"its content has changed \(xxh64\)"),
    ],
)
def test_a_shard_that_the_store_has_not_whole(
    remote: Path, tmp_path: Path, damage: Callable[[Path], None], cause: str, workers: int
) -> None:
    damage(remote / "shard.00007.mds")
    start = time.monotonic()
    with pytest.raises(ShardError, match=rf"remote/shard\.00007\.mds: the shard cannot be fetched: .*{cause}"):
        epoch(images(tmp_path / "cache", remote), workers)
    assert time.monotonic() - start < 15
    assert not (tmp_path / "cache" / "shard.00007.mds").exists()


@WORKERS
@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (Path.unlink, "the shard is missing"),
        (cut, "bytes, the index says"),
        (flip_bit, r"its content has changed \(xxh64\)"),
    ],
)
def test_a_local_data_set_is_verified_but_never_changed(
    remote: Path, damage: Callable[[Path], None], cause: str, workers: int
) -> None:
    shard = remote / "shard.00007.mds"
    damage(shard)
    before = shard.read_bytes() if shard.exists() else None
    with pytest.raises(ShardError, match=rf"shard\.00007\.mds: .*{cause}"):
        epoch(images(remote), workers)
    assert (shard.read_bytes() if shard.exists() else None) == before
    assert epoch_or_none(remote) is None


def epoch_or_none(local: Path) -> list[int] | None:
    try:
        return epoch(images(local), 0)
    except ShardError:
        return None


def test_a_shard_deleted_in_the_middle_of_an_epoch_is_fetched_again(original: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    dataset = images(cache, original)
    seen = []
    for sample in dataset:
        seen.append(sample["sample_id"])
        if len(seen) == 40:
            for path in cache.glob("*.mds"):
                path.unlink()
    assert sorted(seen) == ALL
    assert epoch(dataset, 0) == ALL  # with the shards that the first had done with
    assert dataset.cache_usage == size(cache)


def size(folder: Path) -> int:
    """Of all files that count, in bytes."""
    total = 0
    for file in folder.iterdir():
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # evicted just now
            continue
    return total


@WORKERS
def test_the_cache_limit_holds_on_disk(original: Path, tmp_path: Path, workers: int) -> None:
    # Full of an earlier run's shards, one of them damaged.
    cache, limit = shutil.copytree(original, tmp_path / "cache"), 27_000
    for path in sorted(cache.glob("*.mds"))[4:]:
        path.unlink()
    flip_bit(cache / "shard.00002.mds")
    dataset = images(cache, original, cache_limit=limit)
    largest, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            largest[0] = max(largest[0], size(cache))
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(2):
            assert epoch(dataset, workers) == ALL
    finally:
        stop.set()
        watcher.join()
    assert limit / 2 < largest[0] <= limit
    assert dataset.cache_usage == size(cache)


def test_a_cache_over_its_limit_is_brought_below_it(
    original: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = shutil.copytree(original, tmp_path / "cache")
    cut(cache / "shard.00004.mds")
    with caplog.at_level(logging.WARNING):
        dataset = images(cache, original, cache_limit=30_000)
    assert dataset.cache_usage == size(cache)
    assert "cache_limit 30000 is less than what is mixed at a time, about 1065" in caplog.text
    assert epoch(dataset, 0) == ALL
    assert size(cache) <= 30_000
    assert dataset.cache_usage == size(cache)


def test_what_is_fetched_is_not_evicted_and_what_was_read_last_is_evicted_last(original: Path, tmp_path: Path) -> None:
    dataset = images(shutil.copytree(original, tmp_path / "cache"), original, cache_limit=200_000)
    assert dataset.cache.claim(31) is Claim.OURS  # the one that is next among those not verified
    assert dataset.cache.coldest_shard(wanted=30) == 29
    for sample_id in (0, 40, 90):
        dataset[sample_id]
    dataset[0]
    dataset.cache._unverified.clear()
    assert dataset.cache.coldest_shard(wanted=5) == dataset.spanner[40][0]


def test_several_shards_are_fetched_ahead_but_not_more_than_the_machine_may(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those first that are needed first; two processes share the number."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    dataset = images(tmp_path / "cache", original, timeout=20)
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
    assert dataset.cache.claim(needed[-1]).is_ours  # a thread that needs a shard now is not held up
    dataset.cache.release(needed[-1], ShardState.REMOTE)
    may_end.set()
    wait_until(lambda: all(dataset.cache.is_here(i) for i in needed))
    for ahead in both:
        ahead.stop(wait=True)
    assert len(begun) == len(needed)


def wait_until(holds: Callable[[], bool], seconds: float = 20) -> None:
    with time_limit(seconds):
        while not holds():
            time.sleep(0.005)


def test_threads_that_wait_leave_the_lock_alone(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a shard that another fetches, and for room that only those being fetched take."""
    dataset = images(tmp_path / "cache", original, cache_limit=27_000)
    cache = dataset.cache
    fetched = [i for i in range(8) if cache.claim(i).is_ours]
    assert fetched == list(range(len(fetched)))
    assert 3 < len(fetched) < 8  # the others find no room
    acquired: list[int] = []
    acquire = FileLock.acquire

    def counted(self: FileLock, *args: Any, **kwargs: Any) -> Any:
        acquired.append(threading.get_native_id())
        return acquire(self, *args, **kwargs)

    monkeypatch.setattr(FileLock, "acquire", counted)
    waiting = [threading.Thread(target=cache.prepare, args=(i % 8,)) for i in range(32)]
    for thread in waiting:
        thread.start()
    time.sleep(1.5)  # at least one look whether the fetching thread still exists
    assert acquired == []
    for shard_id in fetched:
        cache.release(shard_id, ShardState.REMOTE)
    for thread in waiting:
        thread.join(20)
    assert all(cache.is_here(i) or cache.states[i] == ShardState.REMOTE for i in range(8))
    assert not any(thread.is_alive() for thread in waiting)
    assert acquired != []


def test_only_a_cache_has_a_limit(original: Path, tmp_path: Path) -> None:
    data = shutil.copytree(original, tmp_path / "data")
    with pytest.raises(ValueError, match="cache_limit is for a remote data set"):
        images(data, cache_limit=30_000)
    with pytest.raises(ValueError, match="remote must be elsewhere than local"):
        images(data, data, cache_limit=30_000)
    with pytest.raises(ValueError, match="cache_limit must be at least 25490 bytes, the index and four shards"):
        images(tmp_path / "cache", data, cache_limit=25_000)
    assert same_files(data, original)


def test_workers_do_not_outlive_their_run(original: Path, tmp_path: Path) -> None:
    """They would hold the cache's lock, here while they wait for a store that is away."""
    cache = tmp_path / "cache"
    cache.mkdir()
    shutil.copy(original / "index.json", cache)
    program = f"""
from d2v_composer.data.streaming_images import StreamingImages
from d2v_composer.data.augmentation import RandomResizedCropFlip
from torch.utils.data import DataLoader
dataset = StreamingImages(local={str(cache)!r}, remote="s3://bucket/images", batch_size=16,
                          transform=RandomResizedCropFlip(24), seed=5, timeout=60)
batches = iter(DataLoader(dataset, 16, num_workers=2))
print("waiting", flush=True)
next(batches)
"""
    environment = os.environ | {"S3_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a"}
    environment |= {"AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
    ) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"waiting\n"
        time.sleep(2)
        workers = psutil.Process(run.pid).children(recursive=True)
        assert len(workers) >= 2
        run.kill()
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive
    assert epoch(images(cache, original), 0) == ALL


def test_two_runs_cannot_share_a_cache(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2v_composer.data.cache_folder.LAST_USER_LEAVES", 0.2)
    program = f"""
import sys, time
from d2v_composer.data.streaming_images import StreamingImages
from d2v_composer.data.augmentation import RandomResizedCropFlip
dataset = StreamingImages(local={str(tmp_path / "cache")!r}, remote={str(original)!r}, batch_size=16,
                          transform=RandomResizedCropFlip(24), seed=5)
next(iter(dataset))
print("reading", flush=True)
time.sleep(60)
"""
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "reading\n"
        with pytest.raises(
            InputError, match=r"cache: another run keeps its shards there: give each a folder of its own"
        ):
            images(tmp_path / "cache", original)
        assert epoch(images(tmp_path / "elsewhere", original), 0) == ALL
    finally:
        other.send_signal(signal.SIGKILL)
        other.communicate()
    assert epoch(images(tmp_path / "cache", original), 0) == ALL
    assert epoch(images(original), 0) == epoch(images(original), 0) == ALL  # a local data set is for everybody


def test_reading_here_and_then_in_workers(original: Path, tmp_path: Path) -> None:
    """A forked worker cannot use a lock that the process made before."""
    dataset = images(tmp_path / "cache", original)
    assert epoch(dataset, 0) == ALL
    assert epoch(dataset, 2) == ALL
    for path in (tmp_path / "cache").glob("*.mds"):
        path.unlink()
    assert epoch(dataset, 2) == ALL


@WORKERS
def test_a_notebook_cell_that_is_run_twice(original: Path, tmp_path: Path, workers: int) -> None:
    """The newer data set is made while the older one, half read, has its name."""
    cache, limit = tmp_path / "cache", 30_000
    older = images(cache, original, cache_limit=limit)
    batches = iter(loader(older, workers))
    next(batches)
    with time_limit(10):
        newer = images(cache, original, cache_limit=limit)
        assert epoch(newer, workers) == ALL
    assert newer.cache_usage == size(cache) <= limit
    with pytest.raises(ShardError, match="cache: a newer data set of this process has taken the folder over"):
        list(batches)
    assert newer.cache_usage == size(cache)
    del older, batches
    assert epoch(newer, 0) == ALL


def test_a_data_set_that_still_fetches(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2v_composer.data.cache_folder.LAST_USER_LEAVES", 0.2)
    older = images(tmp_path / "cache", original)
    download, go_on = older.stream._downloader.download, threading.Event()
    monkeypatch.setattr(older.stream._downloader, "download", lambda *args: go_on.wait(20) and download(*args))
    fetch = threading.Thread(target=older.prepare_shard, args=(7,))
    fetch.start()
    with time_limit(5):
        while not (older._shard_states.numpy() == ShardState.PREPARING).any():
            time.sleep(0.01)
    with pytest.raises(InputError, match="cache: this process still fetches shards there for another data set"):
        images(tmp_path / "cache", original)
    go_on.set()
    fetch.join()
    assert epoch(older, 0) == ALL  # the newer one never was
    assert epoch(images(tmp_path / "cache", original), 0) == ALL


def test_what_could_not_be_made_holds_nothing(original: Path, tmp_path: Path) -> None:
    before = set(Path("/dev/shm").iterdir())
    with pytest.raises(ValueError, match="cache_limit must be at least") as caught:
        images(tmp_path / "cache", original, cache_limit=25_000)
    assert caught.tb is not None  # a notebook keeps it
    with sole_user(tmp_path / "cache" / ".in_use") as is_free:
        assert is_free
    assert set(Path("/dev/shm").iterdir()) - before == set()


@WORKERS
def test_a_full_disk(original: Path, tmp_path: Path, workers: int) -> None:
    dataset = images(tmp_path / "cache", original, timeout=60)
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, largest[1]))  # a write beyond fails as on a full disk
    try:
        with pytest.raises(ShardError, match=rf"shard\.\d+\.mds: .*{os.strerror(errno.EFBIG)}"), time_limit(10):
            epoch(dataset, workers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, largest)
    with time_limit(5):  # the thread that fetches ahead may not be done yet
        while list((tmp_path / "cache").glob("*.partial*")):
            time.sleep(0.01)


def test_a_killed_worker(original: Path, tmp_path: Path) -> None:
    """The epoch ends with torch's word for it: the dead process, or the broken connection of a batch under way."""
    dataset = images(tmp_path / "cache", original)
    batches = iter(loader(dataset, workers=2))
    next(batches)
    os.kill(batches._workers[1].pid, signal.SIGKILL)  # pyright: ignore[reportAttributeAccessIssue]
    dead = r"DataLoader worker .* (killed by signal|exited unexpectedly)"
    with pytest.raises((RuntimeError, ConnectionError, EOFError)) as caught, time_limit(20):
        list(batches)
    assert isinstance(caught.value, (ConnectionError, EOFError)) or re.search(dead, str(caught.value))
    with suppress(RuntimeError):  # the same, where a broken connection came first
        batches._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]


def test_who_waits_for_a_shard_learns_that_it_was_given_up(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several want the same shard of a store that is away; together they are hardly slower than one."""
    dataset = images(tmp_path / "cache", original, timeout=2)
    attempts = []

    def download(*_: object) -> None:
        attempts.append(time.monotonic())
        raise ConnectionError("nobody listens")

    monkeypatch.setattr(LocalDownloader, "download", download)
    failures: list[str] = []

    def fetch() -> None:
        try:
            dataset.prepare_shard(7)
        except ShardError as error:
            failures.append(str(error))

    start = time.monotonic()
    threads = [threading.Thread(target=fetch) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert 2 <= time.monotonic() - start < 3.5
    assert len(attempts) > 4
    assert len(failures) == 3
    assert all("shard.00007.mds: the shard cannot be fetched: nobody listens" in failure for failure in failures)


def test_a_store_that_sends_nothing(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = images(tmp_path / "cache", original, timeout=0.1)
    monkeypatch.setattr(LocalDownloader, "download", lambda *_: None)
    with pytest.raises(ShardError, match="cannot be fetched: the store sent nothing"):
        dataset.prepare_shard(7)


def test_epochs_that_the_workers_do_not_divide(tmp_path: Path) -> None:
    data = write_mds(tmp_path / "data", [encoded_image(i) for i in range(97)])
    dataset = images(data)
    for _ in range(2):
        assert epoch(dataset, 2) == list(range(97))


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
def test_a_process_or_thread_that_ends_while_it_fetches(
    original: Path, tmp_path: Path, fetcher: Callable[[], tuple[int, int]]
) -> None:
    dataset = images(tmp_path / "cache", original, timeout=20)
    assert dataset.cache.claim(7) is Claim.OURS
    dataset.cache._fetchers[14:16] = fetcher()
    dataset.prepare_shard(7, blocking=False)  # does not wait
    assert not (tmp_path / "cache" / "shard.00007.mds").exists()
    with time_limit(5):
        assert epoch(dataset, 0) == ALL
    assert dataset.cache_usage == size(tmp_path / "cache")


def test_shards_without_hashes_are_verified_by_their_size(tmp_path: Path) -> None:
    data = write_mds(tmp_path / "data", [encoded_image(i) for i in range(NUM_SAMPLES)])
    assert not any(shard["raw_data"]["hashes"] for shard in json.loads((data / "index.json").read_text())["shards"])
    assert epoch(images(data), 0) == ALL
    cut(data / "shard.00001.mds")
    with pytest.raises(ShardError, match="bytes, the index says"):
        epoch(images(data), 0)


def test_compressed_shards(tmp_path: Path) -> None:
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    columns = {"image": "bytes"}
    with MDSWriter(out=str(remote), columns=columns, size_limit=4096, compression="zstd", hashes=["sha1"]) as writer:
        for i in range(NUM_SAMPLES):
            writer.write({"image": encoded_image(i)})
    dataset = images(cache, remote)
    assert epoch(dataset, 0) == ALL
    assert not list(cache.glob("*.zstd"))
    assert dataset.cache_usage == size(cache)
    del dataset

    flip_bit(cache / "shard.00003.mds")
    assert epoch(images(cache, remote), 0) == ALL
    flip_bit(remote / "shard.00003.mds.zstd")
    (cache / "shard.00003.mds").unlink()
    with pytest.raises(ShardError, match=r"shard\.00003\.mds\.zstd: .*its content has changed \(sha1\)"):
        epoch(images(cache, remote), 0)


class Attempts:
    """Fails as told, then works."""

    def __init__(self, *failures: Exception) -> None:
        self.failures: Iterator[Exception] = iter(failures)
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        failure = next(self.failures, None)
        if failure is not None:
            raise failure


def test_persistence(caplog: pytest.LogCaptureFixture) -> None:
    away = ConnectionError("nobody listens")
    attempts = Attempts(*[away] * 6)
    with caplog.at_level(logging.WARNING):
        retry(attempts, "s3://bucket/shard", timeout=30)
    assert attempts.count == 7
    assert [record.message.split(";")[0] for record in caplog.records] == ["s3://bucket/shard: nobody listens"] * 6

    attempts = Attempts(*[away] * 10_000)
    with pytest.raises(ConnectionError), time_limit(5):
        retry(attempts, "a shard", timeout=0.1)
    assert attempts.count > 2

    attempts = Attempts(*[FileNotFoundError("not there")] * 10)
    with pytest.raises(FileNotFoundError):
        retry(attempts, "a shard", timeout=30)
    assert attempts.count == 4

    attempts = Attempts(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        retry(attempts, "a shard", timeout=30)
    assert attempts.count == 1


def client_error(status: int, code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")  # pyright: ignore


class GoogleError(Exception):
    """As google.api_core's, whose import warns."""

    def __init__(self, code: HTTPStatus) -> None:
        super().__init__()
        self.code = code


def http_error(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(response=response)


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (client_error(404, "NoSuchKey"), True),
        (client_error(403, "AccessDenied"), True),
        (client_error(400, "RequestTimeout"), False),
        (client_error(503, "SlowDown"), False),
        (NoCredentialsError(), True),
        (GoogleError(HTTPStatus.NOT_FOUND), True),
        (GoogleError(HTTPStatus.SERVICE_UNAVAILABLE), False),
        (azure.core.exceptions.ResourceNotFoundError("gone", response=http_error(404).response), True),  # pyright: ignore
        (http_error(404), True),
        (http_error(502), False),
        (ConnectionResetError("reset"), False),
        (TimeoutError("late"), False),
    ],
)
def test_what_waiting_does_not_mend(error: Exception, lasting: bool) -> None:
    assert is_lasting(error) is lasting
