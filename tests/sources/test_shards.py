"""Epochs from a cache, filled from another folder as from a store: damage, limits, full disks, kills, several runs."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import pytest
from streaming import MDSWriter
from streaming.base.storage import LocalDownloader

from d2v_composer.sources.shards import LOCKS, MIN_AHEAD
from d2v_composer.system.errors import InputError, ShardError
from d2v_composer.system.files import sole_user
from helpers import NUM_IMAGES, encoded_image, flip_bit, time_limit, truncated, wait_until, write_files, write_mds
from streams import open_images, read_epoch

FORK = multiprocessing.get_context("fork")
ALL = list(range(NUM_IMAGES))
LIMIT = 27_000  # of the 118 kB of 32 shards and the index


@pytest.fixture
def remote(many_shards: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return shutil.copytree(many_shards, tmp_path / "remote")


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[str]]:
    """Return the shards that all processes have begun to download."""
    record, download = tmp_path / "downloads", LocalDownloader.download

    def download_and_record(self: LocalDownloader, remote: str, local: str, timeout: float) -> None:
        with record.open("a") as file:
            file.write(f"{Path(remote).name}\n")
        download(self, remote, local, timeout)

    monkeypatch.setattr(LocalDownloader, "download", download_and_record)
    return lambda: [name for name in record.read_text().splitlines() if name.endswith(".mds")]


def damage(path: Path, how: Callable[[bytes], bytes] = flip_bit) -> None:
    path.write_bytes(how(path.read_bytes()))


def same_files(folder: Path, other: Path) -> bool:
    ours, theirs = ({file.name: file.read_bytes() for file in directory.glob("*.mds")} for directory in (folder, other))
    return ours == theirs


def size(folder: Path) -> int:
    """The bytes of all files."""
    total = 0
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # evicted just now
            total += file.stat().st_size if file.is_file() else 0
    return total


def test_deletes_only_its_own_files(remote: Path, tmp_path: Path) -> None:
    """Shards may be in subfolders. Partial files of a process that fetches, in whichever run, stay."""
    cache = tmp_path / "cache"
    (remote / "sub").mkdir()
    shutil.move(remote / "shard.00009.mds", remote / "sub")
    index = json.loads((remote / "index.json").read_text())
    index["shards"][9]["raw_data"]["basename"] = "sub/shard.00009.mds"
    (remote / "index.json").write_text(json.dumps(index))
    foreign = ["notes.partial", "shard.99999.mds.7-7.partial", "mine/shard.00005.mds.7-7.partial"]
    ours = [f"shard.00005.mds.7-7.partial{end}" for end in ("", ".tmp", ".aB3dE5g7", ".reserved")]
    ours += ["sub/shard.00009.mds.7-7.partial", "shard.00008.mds.7-7.partial"]
    write_files(cache, {name: name.encode() for name in (*foreign, *ours)})
    open_images(cache, remote, cache_limit=LIMIT)
    assert [name for name in ours if (cache / name).exists()] == []
    (cache / ours[-1]).write_text("of a live process")
    with sole_user(cache / LOCKS / "shard.00008.mds"):
        other = open_images(cache, remote, cache_limit=LIMIT)
        assert (cache / ours[-1]).exists()
    assert read_epoch(other) == ALL
    assert [name for name in foreign if (cache / name).read_text() != name] == []


def test_waits_for_room_no_longer_than_the_timeout(many_shards: Path, tmp_path: Path) -> None:
    """Processes of another run that were killed keep no room in the cache."""
    cache = tmp_path / "cache"
    dataset = open_images(cache, many_shards, cache_limit=LIMIT, timeout=1)
    shards = sorted(path.name for path in many_shards.glob("*.mds"))
    for name in shards:
        (cache / f"{name}.7-7.partial.reserved").touch()
    with ExitStack() as live, time_limit(30):
        for name in shards[::2]:
            live.enter_context(sole_user(cache / LOCKS / name))
        with pytest.raises(ShardError, match=r"shard\.\d+\.mds: waited 1 s for space in the cache"):
            read_epoch(dataset)
    assert read_epoch(dataset) == ALL


def read_twice(cache: Path, remote: Path, workers: int, limit: int | None) -> None:
    dataset = open_images(cache, remote, cache_limit=limit, timeout=20)
    assert [read_epoch(dataset, workers) for _ in range(2)] == [ALL, ALL]


@pytest.mark.parametrize("limit", [None, LIMIT])
def test_two_runs_share_a_cache(
    many_shards: Path, tmp_path: Path, limit: int | None, downloads: Callable[[], list[str]]
) -> None:
    """Together they fetch each shard once, and stay below the limit. One shard is corrupt from the start."""
    cache = shutil.copytree(many_shards, tmp_path / "cache")
    for path in sorted(cache.glob("*.mds"))[4:]:
        path.unlink()
    damage(cache / "shard.00002.mds")
    runs = [FORK.Process(target=read_twice, args=(cache, many_shards, workers, limit)) for workers in (0, 2)]
    for run in runs:
        run.start()
    largest = 0
    while any(run.is_alive() for run in runs):
        largest = max(largest, size(cache))
        time.sleep(0.0005)
    assert [run.exitcode for run in runs] == [0, 0]
    if limit is None:
        assert same_files(cache, many_shards)
        assert sorted(downloads()) == ["shard.00002.mds", *(f"shard.{i:05}.mds" for i in range(4, 32))]
    else:
        assert limit / 2 < largest <= limit


def test_a_limit_below_what_is_needed_is_told(many_shards: Path, tmp_path: Path) -> None:
    data = shutil.copytree(many_shards, tmp_path / "data")
    for remote in (None, data):
        with pytest.raises(InputError, match="cache_limit: needs a remote data set"):
            open_images(data, remote, cache_limit=30_000)
    least = "cache_limit must be at least 25490 bytes, the size of the index plus four times the size of the largest"
    with pytest.raises(InputError, match=least):
        open_images(tmp_path / "cache", data, cache_limit=25_000)
    assert same_files(data, many_shards)


def test_fetches_several_shards_ahead_but_not_more_than_the_machine_may(
    many_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which they are needed; a thread that needs a shard now does not wait for those."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    shards = open_images(tmp_path / "cache", many_shards, timeout=20).shards
    begun: list[str] = []
    may_end, copy = threading.Event(), LocalDownloader.download

    def download(self: LocalDownloader, address: str, *rest: Any) -> None:
        begun.append(Path(address).name)
        assert may_end.wait(20) or "00030" in address
        copy(self, address, *rest)

    monkeypatch.setattr(LocalDownloader, "download", download)
    shards.fetch_ahead(range(20))
    shards.fetch_ahead(range(20))
    wait_until(lambda: len(begun) == MIN_AHEAD)
    time.sleep(0.1)
    assert sorted(begun) == [f"shard.{i:05}.mds" for i in range(MIN_AHEAD)]
    threading.Thread(target=shards.prepare, args=(30,), daemon=True).start()
    wait_until(lambda: "shard.00030.mds" in begun)
    may_end.set()
    wait_until(lambda: len(list((tmp_path / "cache").glob("*.mds"))) == 21)
    assert len(begun) == 21


@pytest.mark.parametrize("limit", [None, LIMIT])
def test_takes_over_from_a_process_that_is_killed_while_it_fetches(
    many_shards: Path, tmp_path: Path, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: SimpleQueue[str] = FORK.SimpleQueue()
    dataset = open_images(tmp_path / "cache", many_shards, cache_limit=limit, timeout=20)
    with monkeypatch.context() as patch:
        patch.setattr(LocalDownloader, "download", lambda _, address, *rest: begun.put(address) or time.sleep(600))
        process = FORK.Process(target=dataset.shards.prepare, args=(7,))
        process.start()
        assert "00007" in begun.get()
    dataset.shards.fetch_ahead([7])  # does not wait for another process
    assert not (tmp_path / "cache" / "shard.00007.mds").exists()
    waiting = threading.Thread(target=dataset.shards.prepare, args=(7,), daemon=True)
    waiting.start()
    process.kill()
    process.join()
    waiting.join(10)
    assert not waiting.is_alive()
    assert read_epoch(dataset) == ALL


def test_who_waits_for_another_names_the_store_and_the_cause(remote: Path, tmp_path: Path) -> None:
    dataset = open_images(tmp_path / "cache", remote, timeout=0.5)
    shutil.rmtree(remote)
    with (
        sole_user(tmp_path / "cache" / LOCKS / "shard.00007.mds"),
        pytest.raises(ShardError, match=rf"^{remote}/shard\.00007\.mds: the shard cannot be fetched .*No such file"),
    ):
        dataset.shards.prepare(7)


def test_stops_when_the_disk_is_full(many_shards: Path, tmp_path: Path) -> None:
    dataset = open_images(tmp_path / "cache", many_shards, timeout=60)
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, largest[1]))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(ShardError, match=rf"shard\.\d+\.mds: .*{os.strerror(errno.EFBIG)}"), time_limit(40):
            read_epoch(dataset)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, largest)
    # The thread that fetches ahead may not be done yet.
    wait_until(lambda: not list((tmp_path / "cache").glob("*.partial*")), seconds=20)


def test_reads_shards_without_hashes_and_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their size is verified. On a file system without locks, two processes may fetch the same shard."""
    data = write_mds(tmp_path / "data", [encoded_image(i) for i in ALL])
    assert not any(shard["raw_data"]["hashes"] for shard in json.loads((data / "index.json").read_text())["shards"])
    with monkeypatch.context() as patch:

        def no_locks(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        patch.setattr("fcntl.flock", no_locks)
        dataset = open_images(tmp_path / "cache", data, cache_limit=1 << 20)
        assert read_epoch(dataset, workers=2) == ALL
    assert {file.name for file in (tmp_path / "cache").iterdir()} - {file.name for file in data.iterdir()} == {LOCKS}
    damage(data / "shard.00001.mds", truncated)
    with pytest.raises(InputError, match="bytes, but the index says"):
        open_images(data)


def test_reads_compressed_shards(tmp_path: Path) -> None:
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    columns = {"image": "bytes"}
    with MDSWriter(out=str(remote), columns=columns, size_limit=4096, compression="zstd", hashes=["sha1"]) as writer:
        for i in ALL:
            writer.write({"image": encoded_image(i)})
    assert read_epoch(open_images(cache, remote)) == ALL
    assert not list(cache.glob("*.zstd*"))
    local = shutil.copytree(remote, tmp_path / "local")
    assert read_epoch(open_images(local)) == ALL
    damage(cache / "shard.00003.mds")
    assert read_epoch(open_images(cache, remote)) == ALL
    damage(remote / "shard.00003.mds.zstd")
    (cache / "shard.00003.mds").unlink()
    with pytest.raises(ShardError, match=r"shard\.00003\.mds\.zstd: the shard cannot be fetched"):
        read_epoch(open_images(cache, remote))
