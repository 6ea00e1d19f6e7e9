"""Epochs from an object store are whole, or end with an error: kills, an unreachable store, damaged content."""

import gc
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from d2v_composer.data.index import fetch_index
from d2v_composer.system.errors import InputError, ShardError
from gated_store import GatedStore
from helpers import ROOT, small_run, started_ranks, time_limit, wait_until
from programs.preloaded import Program
from streams import open_images, read_epoch

RECORD_SAMPLES = ROOT / "tests" / "programs" / "record_samples.py"
REMOTE = "s3://cloud/images"
NUM_SAMPLES, BATCH_SIZE = 96, 16
BATCHES_PER_EPOCH = NUM_SAMPLES // BATCH_SIZE
# Of 118 kB of shards and index, so that most shards are fetched again in every epoch.
CACHE_LIMIT = 40_000

Record = dict[int, dict[int, str]]
"""Batch → sample id → the pixels' checksum."""


@pytest.fixture(scope="session")
def images(many_shards: Path) -> Path:
    return many_shards


@pytest.fixture(scope="session")
def store(object_store: GatedStore, images: Path) -> GatedStore:
    """The store with the images. A test that changes it restores it."""
    object_store.create_bucket_of_images("cloud", images)
    return object_store


def recorded_run(
    folder: Path, cache: Path, ranks: int, *overrides: str, environment: dict[str, str] | None = None
) -> AbstractContextManager[list[Program]]:
    """Start a run of two epochs that records its samples in ``folder``/samples."""
    arguments = ["max_duration=12ba", f"global_train_batch_size={BATCH_SIZE}", *overrides]
    command = [RECORD_SAMPLES, folder / "samples", *small_run(folder / "run", cache, *arguments)]
    return started_ranks(*command, ranks=ranks, environment=environment)


def cached_remote(*overrides: str) -> list[str]:
    """Return the overrides of a run that fetches most shards again in every epoch."""
    return [f"train_loader.remote={REMOTE}", f"train_loader.cache_limit={CACHE_LIMIT}", *overrides]


def read_record(folder: Path) -> Record:
    """Read the samples that were trained on; a batch that a resume repeated must be the same."""
    record: Record = {}
    for file in sorted((folder / "samples").iterdir()):
        for line in file.read_text().splitlines():
            batch, sample_id, checksum = line.split(" ")
            assert record.setdefault(int(batch), {}).setdefault(int(sample_id), checksum) == checksum
    return record


def assert_whole(record: Record) -> None:
    """Check that every epoch has each sample once, in full batches."""
    assert sorted(record) == list(range(2 * BATCHES_PER_EPOCH))
    assert all(len(samples) == BATCH_SIZE for samples in record.values())
    for first in (0, BATCHES_PER_EPOCH):
        ids = Counter(i for batch in range(first, first + BATCHES_PER_EPOCH) for i in record[batch])
        assert ids == Counter(range(NUM_SAMPLES))


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The samples of a run from the local folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with recorded_run(folder, images, 1) as programs:
        assert_succeed(programs)
    record = read_record(folder)
    assert_whole(record)
    return record


def assert_succeed(programs: list[Program]) -> None:
    for program in programs:
        assert program.wait(120) == 0, program.stderr


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(1, 3), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(2, 0), (1, 0), (2, 3)])],
)
def test_epochs_are_whole_though_killed(
    store: GatedStore, undisturbed: Record, tmp_path: Path, ranks: int, workers: int
) -> None:
    """The run is killed at any batch of the second epoch, and resumed on 3 - ranks."""
    overrides = cached_remote(f"train_loader.num_workers={workers}")
    kill_at = random.randint(BATCHES_PER_EPOCH + 1, 2 * BATCHES_PER_EPOCH - 1)
    environment = store.environment | {"KILL_AT": str(kill_at)}
    with recorded_run(tmp_path, tmp_path / "cache", ranks, *overrides, environment=environment) as programs:
        assert next(program.wait(120) for program in programs) == -signal.SIGKILL, programs[0].stderr
    assert kill_at - 1 <= max(read_record(tmp_path)) <= kill_at  # the other rank may have had the batch
    with recorded_run(tmp_path, tmp_path / "cache", 3 - ranks, *overrides, environment=store.environment) as programs:
        assert_succeed(programs)
    record = read_record(tmp_path)
    assert_whole(record)
    assert record == undisturbed  # the same samples in the same batches, with the same pixels


def wait_for_batch(folder: Path, batch: int) -> None:
    wait_until(lambda: any(f"\n{batch} " in file.read_text() for file in folder.glob("samples/*")), seconds=60)


def retries(programs: list[Program]) -> list[int]:
    return [program.stderr.count("retrying for") for program in programs]


@pytest.mark.parametrize(
    ("ranks", "workers", "num_retries"), [(1, 0, 3), pytest.param(2, 3, 6, marks=pytest.mark.slow)]
)
def test_epochs_are_whole_though_the_store_is_unreachable_for_a_while(
    store: GatedStore, undisturbed: Record, tmp_path: Path, ranks: int, workers: int, num_retries: int
) -> None:
    overrides = cached_remote(f"train_loader.num_workers={workers}")
    with recorded_run(tmp_path, tmp_path / "cache", ranks, *overrides, environment=store.environment) as programs:
        wait_for_batch(tmp_path, 2)
        with store.unreachable():
            wait_until(lambda: max(retries(programs)) >= num_retries, seconds=60)
            assert [program.poll() for program in programs] == [None] * ranks
            assert len(read_record(tmp_path)) < 2 * BATCHES_PER_EPOCH
        assert_succeed(programs)
    assert_whole(read_record(tmp_path))
    assert read_record(tmp_path) == undisturbed


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(2, 0), pytest.param(1, 0, marks=pytest.mark.slow), pytest.param(2, 3, marks=pytest.mark.slow)],
)
def test_a_run_ends_if_the_store_stays_unreachable(store: GatedStore, tmp_path: Path, ranks: int, workers: int) -> None:
    overrides = cached_remote(f"train_loader.num_workers={workers}", "train_loader.timeout=3")
    with recorded_run(tmp_path, tmp_path / "cache", ranks, *overrides, environment=store.environment) as programs:
        wait_for_batch(tmp_path, 2)
        with store.unreachable():
            statuses = [program.wait(60) for program in programs]
        said = "".join(program.stdout + program.stderr for program in programs)
    assert 0 not in statuses
    assert "ShardError: s3://cloud/images/shard.000" in said
    assert "the shard cannot be fetched: Could not connect to the endpoint URL" in said
    assert len(read_record(tmp_path)) < 2 * BATCHES_PER_EPOCH


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "cause"),
    [(None, "Not Found|not found"), (truncated, "bytes, the index says"), (flip_bit, "its content has changed")],
)
def test_an_epoch_ends_at_a_shard_that_is_damaged_in_the_store(
    store: GatedStore,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[bytes], bytes] | None,
    cause: str,
) -> None:
    """In this process and in workers; the error names the shard. Once the shard is repaired, the epoch is whole."""
    monkeypatch.setattr("d2v_composer.system.retry.FIRST_PAUSE", 0.01)
    use(store, monkeypatch)
    key = {"Bucket": "cloud", "Key": "images/shard.00007.mds"}
    if damage is None:
        store.client().delete_object(**key)
    else:
        store.client().put_object(**key, Body=damage((images / "shard.00007.mds").read_bytes()))
    for workers in (0, 2):
        cache = tmp_path / f"{workers} workers"
        fetch_index(REMOTE, cache)
        with pytest.raises(ShardError, match=rf"s3://cloud/images/shard\.00007\.mds: .*({cause})"):
            read_epoch(open_images(cache, REMOTE, timeout=5), workers)
        assert not list(cache.glob("shard.00007*"))
    store.client().put_object(**key, Body=(images / "shard.00007.mds").read_bytes())
    gc.collect()  # the data set that failed, which still has the cache, is in a cycle
    assert read_epoch(open_images(cache, REMOTE)) == list(range(NUM_SAMPLES))


def use(store: GatedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)


def test_refuses_a_truncated_changed_or_missing_index(
    store: GatedStore, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(store, monkeypatch)
    key = {"Bucket": "cloud", "Key": "images/index.json"}
    index = (images / "index.json").read_bytes()
    cache = shutil.copytree(images, tmp_path / "cache")

    store.client().put_object(**key, Body=truncated(index))
    with pytest.raises(InputError, match=r"s3://cloud/images/index\.json: corrupt, or not an MDS index"):
        fetch_index(REMOTE, tmp_path / "new")
    with pytest.raises(InputError, match=r"s3://cloud/images/index\.json: corrupt, or not an MDS index"):
        fetch_index(REMOTE, cache)
    assert (cache / "index.json").read_bytes() == index
    assert not (tmp_path / "new" / "index.json").exists()

    other = json.loads(index)
    other["shards"].pop()
    store.client().put_object(**key, Body=json.dumps(other).encode())
    with pytest.raises(InputError, match="cache: holds shards of another data set than s3://cloud/images"):
        fetch_index(REMOTE, cache)

    store.client().delete_object(**key)
    with pytest.raises(InputError, match=r"s3://cloud/images/index\.json: cannot be fetched \(.*not found"):
        fetch_index(REMOTE, cache)
    store.client().put_object(**key, Body=index)
    fetch_index(REMOTE, cache)
    assert {file.name for file in cache.iterdir()} == {file.name for file in images.iterdir()}


def test_an_unreachable_store_does_not_end_a_restart_whose_index_is_here(
    store: GatedStore, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use(store, monkeypatch)
    fetch_index(REMOTE, tmp_path)
    index = (images / "index.json").read_bytes()
    with ThreadPoolExecutor() as pool:
        with store.unreachable():
            fetch_index(REMOTE, tmp_path)
            assert f"the index in {tmp_path} is used" in caplog.text
            fetching = pool.submit(fetch_index, REMOTE, tmp_path / "new", 60.0)  # none is here: it is waited for
            wait_until(lambda: "retrying" in caplog.text)
        fetching.result()
    assert [path.read_bytes() for path in (tmp_path / "index.json", tmp_path / "new" / "index.json")] == [index] * 2


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch"),
        ({"AWS_ACCESS_KEY_ID": "nobody"}, "InvalidAccessKeyId"),
        ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "Unable to locate credentials"),
        ({"S3_ENDPOINT_URL": "http://127.0.0.1:9"}, "Could not connect to the endpoint URL"),
        ({"S3_ENDPOINT_URL": "127.0.0.1:9"}, "Invalid endpoint"),
    ],
)
def test_says_why_the_store_refuses_access(
    store: GatedStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, str | None],
    cause: str,
) -> None:
    use(store, monkeypatch)
    for name, value in change.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with (
        pytest.raises(InputError, match=rf"s3://cloud/images/index\.json: cannot be fetched \(.*({cause})"),
        time_limit(30),
    ):
        fetch_index(REMOTE, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
