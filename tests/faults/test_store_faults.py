"""Epochs from an object store are whole, or end in an error: kills, a store that goes away, faults of its content."""

import gc
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from d2v_composer.benchmarks.object_store import ObjectStore
from d2v_composer.data.augmentation import RandomResizedCropFlip
from d2v_composer.data.mds_index import fetch_index
from d2v_composer.data.streaming_images import StreamingImages
from d2v_composer.data.verified_stream import ShardError
from d2v_composer.system.errors import InputError
from helpers import ROOT, command_environment, run_command, small_run, time_limit, train_command

RECORD_SAMPLES = ROOT / "tests" / "programs" / "record_samples.py"
REMOTE = "s3://cloud/images"
NUM_SAMPLES, BATCH_SIZE = 96, 16
BATCHES_PER_EPOCH = NUM_SAMPLES // BATCH_SIZE
# Of 118 kB of shards and index: most shards are fetched again in every epoch.
CACHE_LIMIT = 40_000

Record = dict[int, dict[int, str]]
"""Batch → sample id → the pixels' checksum."""


@pytest.fixture(scope="module")
def images(many_shards: Path) -> Path:
    return many_shards


@pytest.fixture(scope="module")
def store(images: Path) -> Iterator[ObjectStore]:
    """One that holds the images; who treats it badly puts all back."""
    with ObjectStore() as store:
        store.create_bucket("cloud")
        for file in images.iterdir():
            store.client().upload_file(str(file), "cloud", f"images/{file.name}")
        yield store


def recorded_run(folder: Path, cache: Path, ranks: int, *overrides: str) -> list[str]:
    """The command of a run of two epochs that records its samples in ``folder``/samples."""
    arguments = small_run(
        folder / "run", cache, "max_duration=12ba", f"global_train_batch_size={BATCH_SIZE}", *overrides
    )
    command = train_command(arguments, ranks)
    script = command.index(next(part for part in command if part.endswith("train.py")))
    return [*command[:script], str(RECORD_SAMPLES), str(folder / "samples"), *command[script + 1 :]]


def cached_remote(*overrides: str) -> list[str]:
    """The overrides of a run that fetches most shards again in every epoch."""
    return [f"train_loader.remote={REMOTE}", f"train_loader.cache_limit={CACHE_LIMIT}", *overrides]


def read_record(folder: Path) -> Record:
    """What was trained on; a batch that a resume repeated must have been the same."""
    record: Record = {}
    for file in sorted((folder / "samples").iterdir()):
        for line in file.read_text().splitlines():
            batch, sample_id, checksum = line.split(" ")
            assert record.setdefault(int(batch), {}).setdefault(int(sample_id), checksum) == checksum
    return record


def assert_whole(record: Record) -> None:
    """Every epoch has each sample once, in full batches."""
    assert sorted(record) == list(range(2 * BATCHES_PER_EPOCH))
    assert all(len(samples) == BATCH_SIZE for samples in record.values())
    for first in (0, BATCHES_PER_EPOCH):
        ids = Counter(i for batch in range(first, first + BATCHES_PER_EPOCH) for i in record[batch])
        assert ids == Counter(range(NUM_SAMPLES))


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """What a run from the local folder trains on."""
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run_command(*recorded_run(folder, images, 1))
    assert result.returncode == 0, result.stderr
    record = read_record(folder)
    assert_whole(record)
    return record


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(1, 3), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(2, 0), (1, 0), (2, 3)])],
)
def test_epochs_are_whole_though_killed(
    store: ObjectStore, undisturbed: Record, tmp_path: Path, ranks: int, workers: int
) -> None:
    """The first epoch with as many ranks; killed somewhere in the second, which 3 - ranks go on with."""
    overrides = cached_remote(f"train_loader.num_workers={workers}")
    kill_at = random.randint(BATCHES_PER_EPOCH + 1, 2 * BATCHES_PER_EPOCH - 1)
    command = recorded_run(tmp_path, tmp_path / "cache", ranks, *overrides)
    killed = run_command(*command, environment=store.environment | {"KILL_AT": str(kill_at)})
    assert killed.returncode != 0
    assert kill_at - 1 <= max(read_record(tmp_path)) <= kill_at  # the other rank may have had the batch
    command = recorded_run(tmp_path, tmp_path / "cache", 3 - ranks, *overrides)
    again = run_command(*command, environment=store.environment)
    assert again.returncode == 0, again.stderr
    record = read_record(tmp_path)
    assert_whole(record)
    assert record == undisturbed  # the same samples in the same batches, with the same pixels


@contextmanager
def started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A run in the background, which is gone after the block."""
    variables = command_environment() | environment
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables, start_new_session=True
    ) as run:
        try:
            yield run
        finally:
            if run.poll() is None:
                os.killpg(run.pid, signal.SIGKILL)


def wait_for_batch(folder: Path, batch: int) -> None:
    with time_limit(60):
        while not any(f"\n{batch} " in file.read_text() for file in folder.glob("samples/*")):
            time.sleep(0.05)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), pytest.param(2, 3, marks=pytest.mark.slow)])
def test_a_store_that_is_away_for_twenty_seconds(
    store: ObjectStore, undisturbed: Record, tmp_path: Path, ranks: int, workers: int
) -> None:
    overrides = cached_remote(f"train_loader.num_workers={workers}")
    with started(recorded_run(tmp_path, tmp_path / "cache", ranks, *overrides), store.environment) as run:
        wait_for_batch(tmp_path, 2)
        store.kill()
        try:
            time.sleep(20)
            assert run.poll() is None
            assert len(read_record(tmp_path)) < 2 * BATCHES_PER_EPOCH
        finally:
            store.start()
        _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert_whole(read_record(tmp_path))
    assert read_record(tmp_path) == undisturbed


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(2, 0), pytest.param(1, 0, marks=pytest.mark.slow), pytest.param(2, 3, marks=pytest.mark.slow)],
)
def test_a_store_that_is_gone_for_good(store: ObjectStore, tmp_path: Path, ranks: int, workers: int) -> None:
    overrides = cached_remote(f"train_loader.num_workers={workers}", "train_loader.timeout=10")
    with started(recorded_run(tmp_path, tmp_path / "cache", ranks, *overrides), store.environment) as run:
        wait_for_batch(tmp_path, 2)
        store.kill()
        try:
            # Ten seconds, the last attempt's own, and up to thirty that the launcher gives the other rank.
            output, errors = run.communicate(timeout=90)
        finally:
            store.start()
    assert run.returncode != 0
    said = output + errors
    assert "ShardError: s3://cloud/images/shard.000" in said
    assert "the shard cannot be fetched: Could not connect to the endpoint URL" in said
    assert len(read_record(tmp_path)) < 2 * BATCHES_PER_EPOCH


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "cause"),
    [(None, "Not Found|not found"), (cut, "bytes, the index says"), (flip_bit, "its content has changed")],
)
def test_a_shard_that_the_store_has_not_whole(
    store: ObjectStore,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[bytes], bytes] | None,
    cause: str,
    workers: int,
) -> None:
    monkeypatch.setattr("d2v_composer.system.retry.FIRST_PAUSE", 0.1)
    use(store, monkeypatch)
    key = {"Bucket": "cloud", "Key": "images/shard.00007.mds"}
    if damage is None:
        store.client().delete_object(**key)
    else:
        store.client().put_object(**key, Body=damage((images / "shard.00007.mds").read_bytes()))
    fetch_index(REMOTE, tmp_path / "cache")
    batches = iter(loader(tmp_path / "cache", workers))
    with pytest.raises(ShardError, match=rf"s3://cloud/images/shard\.00007\.mds: .*({cause})"), time_limit(30):
        list(batches)
    assert not list((tmp_path / "cache").glob("shard.00007*"))
    if workers:
        batches._shutdown_workers()  # pyright: ignore[reportAttributeAccessIssue]

    # Put back, it is as if nothing had been.
    store.client().put_object(**key, Body=(images / "shard.00007.mds").read_bytes())
    del batches
    gc.collect()  # what failed refers to itself, and has the cache
    ids = [i for batch in loader(tmp_path / "cache", 0) for i in batch["sample_id"].tolist()]
    assert sorted(ids) == list(range(NUM_SAMPLES))


def loader(cache: Path, workers: int) -> DataLoader:
    dataset = StreamingImages(
        local=cache, remote=REMOTE, batch_size=BATCH_SIZE, transform=RandomResizedCropFlip(24), seed=5, timeout=5
    )
    return DataLoader(dataset, BATCH_SIZE, num_workers=workers)


def use(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)


def test_indices(store: ObjectStore, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(store, monkeypatch)
    key = {"Bucket": "cloud", "Key": "images/index.json"}
    index = (images / "index.json").read_bytes()
    cache = shutil.copytree(images, tmp_path / "cache")

    store.client().put_object(**key, Body=cut(index))
    with pytest.raises(InputError, match=r"s3://cloud/images/index\.json: damaged, or not an MDS index"):
        fetch_index(REMOTE, tmp_path / "new")
    with pytest.raises(InputError, match=r"s3://cloud/images/index\.json: damaged, or not an MDS index"):
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
def test_a_store_that_does_not_let_us_in(
    store: ObjectStore,
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
