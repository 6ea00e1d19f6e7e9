"""Promises 4 to 9: every sample once an epoch, whatever store, cache, machine or neighbor does; whole conversions."""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import StreamingDataset

from gated_store import FAULTS, GatedStore
from helpers import (
    D2V,
    GOLDEN,
    NUM_IMAGES,
    QUICKSTART,
    Record,
    assert_gone,
    assert_succeed,
    contents_of,
    d2v,
    encoded_image,
    failure,
    family_of,
    flip_bit,
    read_record,
    recorded,
    refused_run,
    run_command,
    small_run,
    start_python,
    succeed,
    train_command,
    truncated,
    wait_until,
    write_files,
    write_mds,
)
from programs.preloaded import Program

REMOTE = "s3://cloud/images"
BATCH_SIZE = 16
BATCHES_PER_EPOCH = NUM_IMAGES // BATCH_SIZE
# Of 118 kB of shards and index, so that most shards are fetched again in every epoch.
CACHE_LIMIT = 40_000
NAMED = "images/shard.00007.mds"


@pytest.fixture(scope="module")
def store(object_store: GatedStore, many_shards: Path) -> GatedStore:
    """The store with the images. A test that changes it restores it."""
    object_store.create_bucket_of_images("cloud", many_shards)
    return object_store


def two_epochs(folder: Path, cache: Path, *overrides: str, **options: Any) -> AbstractContextManager[list[Program]]:
    """Start a run of two epochs that records its samples in ``folder``/samples."""
    arguments = ["max_duration=12ba", f"global_train_batch_size={BATCH_SIZE}", *overrides]
    return recorded(folder, small_run(folder / "run", cache, *arguments), **options)


def from_store(*overrides: str) -> list[str]:
    """Return the overrides of a run that fetches most shards again in every epoch."""
    return [f"train_loader.remote={REMOTE}", f"train_loader.cache_limit={CACHE_LIMIT}", *overrides]


def assert_whole(record: Record) -> None:
    """Check that every epoch has each sample once, in full batches, and almost all with other pixels than before."""
    assert sorted(record) == list(range(2 * BATCHES_PER_EPOCH))
    assert all(len(samples) == BATCH_SIZE for samples in record.values())
    for first in (0, BATCHES_PER_EPOCH):
        ids = Counter(i for batch in range(first, first + BATCHES_PER_EPOCH) for i in record[batch])
        assert ids == Counter(range(NUM_IMAGES))
    assert len({sample for samples in record.values() for sample in samples.items()}) > 1.9 * NUM_IMAGES


@pytest.fixture(scope="module")
def undisturbed(many_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    """The samples of a run from the local folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with two_epochs(folder, many_shards) as programs:
        assert_succeed(programs)
    record = read_record(folder)
    assert_whole(record)
    return record


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(1, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(2, 0), (1, 0), (2, 3)])],
)
def test_epochs_are_whole_though_killed(
    store: GatedStore, undisturbed: Record, tmp_path: Path, ranks: int, workers: int
) -> None:
    """3, 4, 8: killed at a random batch and resumed on 3 - ranks: same samples, batches, pixels; in a small cache."""
    overrides, cache = from_store(f"train_loader.num_workers={workers}"), tmp_path / "cache"
    kill_at = random.randint(BATCHES_PER_EPOCH + 1, 2 * BATCHES_PER_EPOCH - 1)
    kill = {"AT": f"batch_start {kill_at} kill"}
    with two_epochs(tmp_path, cache, *overrides, ranks=ranks, environment=store.environment | kill) as programs:
        wait_until(lambda: programs[0].poll() == -signal.SIGKILL, seconds=120)
        for other in programs[1:]:  # 18: without a traceback
            assert "another rank has ended" in failure(other, other.wait(60))
    assert kill_at - 1 <= max(read_record(tmp_path)) <= kill_at  # the other rank may have had the batch
    largest = 0
    with two_epochs(tmp_path, cache, *overrides, ranks=3 - ranks, environment=store.environment) as programs:
        while any(program.poll() is None for program in programs):
            largest = max(largest, bytes_in(cache))
            time.sleep(0.02)
        assert_succeed(programs)
    assert_whole(read_record(tmp_path))
    assert read_record(tmp_path) == undisturbed
    assert CACHE_LIMIT // 2 < largest <= CACHE_LIMIT + (1 << 14), largest  # one shard, 4 kB, may be on its way


def bytes_in(folder: Path) -> int:
    """Return the size of a cache's shards."""
    total = 0
    for path in folder.glob("*.mds") if folder.exists() else ():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), pytest.param(2, 0, marks=pytest.mark.slow)])
def test_epochs_are_whole_though_the_store_fails(
    store: GatedStore, undisturbed: Record, tmp_path: Path, ranks: int, workers: int
) -> None:
    """4, 6: answers are cut, empty, errors, short, slow and wrong; later it is down for two seconds."""
    for number, fault in enumerate(FAULTS):
        store.faults[f"cloud/images/shard.{3 * number:05}.mds"] = [fault]
    overrides = from_store(f"train_loader.num_workers={workers}")
    with two_epochs(tmp_path, tmp_path / "cache", *overrides, ranks=ranks, environment=store.environment) as programs:
        wait_for_batch(tmp_path, 2)
        with store.unreachable():
            time.sleep(2)
            assert [program.poll() for program in programs] == [None] * ranks
            assert len(read_record(tmp_path)) < 2 * BATCHES_PER_EPOCH
        assert_succeed(programs)
    assert not any(store.faults.values())
    assert_whole(read_record(tmp_path))
    assert read_record(tmp_path) == undisturbed


def wait_for_batch(folder: Path, batch: int) -> None:
    wait_until(lambda: any(f"\n{batch} " in file.read_text() for file in folder.glob("samples/*")), seconds=60)


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(2, 0), pytest.param(1, 0, marks=pytest.mark.slow), pytest.param(2, 3, marks=pytest.mark.slow)],
)
def test_a_run_ends_if_the_store_stays_unreachable(store: GatedStore, tmp_path: Path, ranks: int, workers: int) -> None:
    """4, 6, 18: once train_loader.timeout is over, in one line that names a shard."""
    overrides = from_store(f"train_loader.num_workers={workers}", "train_loader.timeout=3")
    with two_epochs(tmp_path, tmp_path / "cache", *overrides, ranks=ranks, environment=store.environment) as programs:
        wait_for_batch(tmp_path, 2)
        with store.unreachable():
            assert 0 not in [program.wait(60) for program in programs]
        said = "".join(program.stderr for program in programs)
    assert f"{REMOTE}/shard.000" in said
    assert "Could not connect to the endpoint URL" in said
    assert "Traceback" not in said
    assert len(read_record(tmp_path)) < 2 * BATCHES_PER_EPOCH


@pytest.mark.parametrize("damage", [None, flip_bit, pytest.param(truncated, marks=pytest.mark.slow)])
@pytest.mark.parametrize("place", ["folder", "store"])
def test_a_damaged_shard_is_named(
    store: GatedStore, many_shards: Path, tmp_path: Path, damage: Callable[[bytes], bytes] | None, place: str
) -> None:
    """4, 5, 7, 18: a missing, altered or truncated shard ends the epoch in one line.

    A folder stays as it is, and a cache holds no such shard.
    """
    images = shutil.copytree(many_shards, tmp_path / "images")
    content = (many_shards / "shard.00007.mds").read_bytes()
    damaged = None if damage is None else damage(content)
    if place == "folder":
        (images / "shard.00007.mds").unlink()
        if damaged is not None:
            (images / "shard.00007.mds").write_bytes(damaged)
    before = contents_of(images)
    data = images if place == "folder" else tmp_path / "cache"
    options = from_store("train_loader.timeout=5") if place == "store" else []
    with (
        store.replaced("cloud", NAMED, damaged),
        two_epochs(tmp_path, data, *options, "train_loader.num_workers=1", environment=store.environment) as [program],
    ):
        status = program.wait(60)
    assert status in (1, 2)  # a missing one may be found before the run starts
    assert "shard.00007.mds" in failure(program, status)
    if place == "folder":
        assert contents_of(images) == before
    else:
        assert not (data / "shard.00007.mds").exists()


def test_a_cached_shard_is_verified(store: GatedStore, many_shards: Path, undisturbed: Record, tmp_path: Path) -> None:
    """5, 7: an altered shard of an earlier run is fetched again; a file that is not ours stays."""
    cache = shutil.copytree(many_shards, tmp_path / "cache")
    for name, damage in {"shard.00003.mds": flip_bit, "shard.00011.mds": truncated}.items():
        (cache / name).write_bytes(damage((cache / name).read_bytes()))
    (cache / "notes.txt").write_text("mine")
    overrides = (f"train_loader.remote={REMOTE}", "train_loader.num_workers=1")
    with two_epochs(tmp_path, cache, *overrides, environment=store.environment) as programs:
        assert_succeed(programs)
    assert read_record(tmp_path) == undisturbed
    assert (cache / "notes.txt").read_text() == "mine"
    for name in ("shard.00003.mds", "shard.00011.mds"):
        assert (cache / name).read_bytes() == (many_shards / name).read_bytes()


def test_runs_beside_each_other_do_not_disturb(store: GatedStore, undisturbed: Record, tmp_path: Path) -> None:
    """7: each has its own TMPDIR; of two in one cache, one may be refused in a line."""
    caches = {"alone": tmp_path / "own", "one": tmp_path / "cache", "two": tmp_path / "cache"}
    programs = {}
    with ExitStack() as runs:
        for name, cache in caches.items():
            (tmp_path / name / "tmp").mkdir(parents=True)
            variables = store.environment | {"TMPDIR": str(tmp_path / name / "tmp")}
            options = from_store("train_loader.num_workers=1")
            [programs[name]] = runs.enter_context(two_epochs(tmp_path / name, cache, *options, environment=variables))
        refused = [name for name, program in programs.items() if program.wait(120) != 0]
    assert refused in ([], ["one"], ["two"])
    for name in refused:
        assert "cache" in failure(programs[name], 2)
    assert all(read_record(tmp_path / name) == undisturbed for name in caches.keys() - {*refused})


@pytest.mark.slow
def test_each_node_fetches_its_own_share(store: GatedStore, tmp_path: Path) -> None:
    """8: two nodes of one rank each, with their own caches."""
    caches = tmp_path / "cache-${oc.env:NODE_RANK}"
    options = ("max_duration=6ba", f"train_loader.remote={REMOTE}", "train_loader.num_canonical_nodes=2")
    with two_epochs(tmp_path, caches, *options, ranks=2, num_nodes=2, environment=store.environment) as nodes:
        assert_succeed(nodes)
    ids = Counter(i for samples in read_record(tmp_path).values() for i in samples)
    assert ids == Counter(range(NUM_IMAGES))
    shards = [{path.name for path in tmp_path.glob(f"cache-{rank}/*.mds")} for rank in (0, 1)]
    assert min(map(len, shards)) < len(shards[0] | shards[1])


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch"),
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "credentials"),
        ({"S3_ENDPOINT_URL": "http://127.0.0.1:9"}, "Could not connect to the endpoint URL"),
    ],
)
def test_says_why_the_store_refuses_access(
    store: GatedStore, tmp_path: Path, change: dict[str, str], cause: str
) -> None:
    """6, 18."""
    arguments = small_run(tmp_path / "run", tmp_path / "cache", *from_store("train_loader.timeout=2"))
    ended = run_command(*train_command(arguments), environment=store.environment | change)
    line = failure(ended, ended.returncode)
    assert ended.returncode in (1, 2)
    assert f"{REMOTE}/index.json" in line
    assert cause in line


@pytest.mark.parametrize("bad", ["truncated", "missing", "of another data set"])
def test_a_bad_index_in_the_store_is_one_line(store: GatedStore, many_shards: Path, tmp_path: Path, bad: str) -> None:
    """5, 18: and the cache's stays as it was."""
    index = (many_shards / "index.json").read_bytes()
    other = json.loads(index)
    other["shards"].pop()
    contents = {"truncated": truncated(index), "missing": None, "of another data set": json.dumps(other).encode()}
    cache = shutil.copytree(many_shards, tmp_path / "cache")
    arguments = small_run(tmp_path / "run", cache, f"train_loader.remote={REMOTE}", "train_loader.timeout=2")
    with store.replaced("cloud", "images/index.json", contents[bad]):
        line = refused_run(arguments, environment=store.environment)
    assert str(cache) in line or f"{REMOTE}/index.json" in line
    assert (cache / "index.json").read_bytes() == index


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(tmp_path: Path, workers: int) -> None:
    """4, 18."""
    data = write_mds(tmp_path / "data", [*(encoded_image(i) for i in range(31)), b"not a picture"])
    line = refused_run(small_run(tmp_path / "run", data, f"train_loader.num_workers={workers}"))
    assert "sample 31 of " in line
    assert "cannot decode as an image (13 bytes)" in line


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand JPEGs in two folders of classes, one of which is none."""
    images = [encoded_image(i, size=64) for i in range(8)]
    files = {f"{label}/{i:04}.jpg": images[i % 8] for i, label in product(range(500), "ab")}
    return write_files(tmp_path_factory.mktemp("photos"), files | {"b/0300.jpg": b"not a picture"})


def test_a_conversion_is_whole_or_nothing(photos: Path, tmp_path: Path) -> None:
    """9: killed twice, the same command goes on to the same bytes, which Streaming reads; a bad image is named."""
    whole, out = tmp_path / "whole", tmp_path / "killed"
    options = ("--resize", "48", "--shard-size", "100kb")
    refused = d2v("convert-images", photos, tmp_path / "refused", *options)
    assert "0300.jpg" in failure(refused, 2)
    assert not (tmp_path / "refused" / "index.json").exists()
    ended = succeed("convert-images", photos, whole, *options, "--skip-unreadable", "--workers", "2")
    assert "0300.jpg" in ended.stdout + ended.stderr
    command = ("convert-images", photos, out, *options, "--skip-unreadable")
    for num_shards, workers in ((1, "2"), (3, "1")):
        program = start_python(*D2V, *command, "--workers", workers)
        wait_until(lambda num_shards=num_shards: len(list(out.glob("shard.*.mds"))) >= num_shards, seconds=60)
        family = family_of(program.pid)
        program.kill()
        assert_gone(family)
        assert not (out / "index.json").exists()
    succeed(*command, "--workers", "3")
    assert contents_of(out) == contents_of(whole)
    dataset: Any = StreamingDataset(local=str(out), shuffle=False, batch_size=1)
    assert len(dataset) == 999
    assert Counter(int(dataset[i]["label"]) for i in range(len(dataset))) == {0: 500, 1: 499}


def test_embed_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    """21: killed and interrupted at random moments; one line says how to go on."""
    model, source = GOLDEN / "tiny_base.pt", QUICKSTART / "cifar10" / "train"
    options = ("--workers", "1", "--batch-size", "50")
    succeed("embed", model, source, tmp_path / "whole.npy", *options)
    command = [*D2V, "embed", model, source, tmp_path / "killed.npy", *options]
    for number, sent in enumerate((signal.SIGKILL, signal.SIGINT, signal.SIGTERM)):
        program = start_python(*command)
        wait_until(lambda program=program: len(family_of(program.pid)) > 1, seconds=60)
        time.sleep(0.3 + number / 10)  # it embeds for few seconds in all
        family = family_of(program.pid)
        os.killpg(program.pid, sent)
        assert program.wait(30) == (-sent if sent == signal.SIGKILL else 128 + sent), program.stderr
        assert_gone(family)
        assert sent == signal.SIGKILL or program.stderr.splitlines()[-1].startswith(("Interrupted", "SIGTERM"))
        assert not (tmp_path / "killed.npy").exists()
    succeed(*command[2:])
    assert (tmp_path / "killed.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert np.isfinite(np.load(tmp_path / "killed.npy")).all()
