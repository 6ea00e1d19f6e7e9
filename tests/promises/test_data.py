"""Promises 3 to 9: every sample once an epoch, whatever store, cache, machine or neighbor does; whole conversions.

What is sound's alone, but for batches of similar length, is in tests/conversion.
"""

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, suppress
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
    ROOT,
    Record,
    assert_gone,
    assert_same_losses,
    assert_same_student,
    assert_succeed,
    contents_of,
    d2v,
    encoded_clip,
    encoded_image,
    failure,
    family_of,
    flip_bit,
    losses_of,
    read_record,
    recorded,
    refused_run,
    run_training,
    slow,
    small_run,
    start_python,
    succeed,
    truncated,
    wait_until,
    write_files,
    write_mds,
)
from programs.preloaded import Program

REMOTE = "train_loader.remote=s3://cloud/images"
BATCH_SIZE = 16
BATCHES_PER_EPOCH = NUM_IMAGES // BATCH_SIZE
# Of 118 kB of shards and index, so that most shards are fetched again in every epoch.
CACHE_LIMIT = 40_000
SMALL_CACHE = f"train_loader.cache_limit={CACHE_LIMIT}"
NAMED = "shard.00007.mds"
Programs = AbstractContextManager[list[Program]]


@pytest.fixture(scope="module")
def store(object_store: GatedStore, many_shards: Path) -> GatedStore:
    """The store with the images. A test that changes it restores it."""
    object_store.create_bucket_of_images("cloud", many_shards)
    return object_store


def two_epochs(folder: Path, data: Path, *overrides: str, **options: Any) -> Programs:
    """Start a run of two epochs that records its samples in ``folder``/samples."""
    smallest = "student.depth=1", "alignment.max_samples=0", "callbacks={}"
    arguments = ["max_duration=12ba", f"global_train_batch_size={BATCH_SIZE}", *smallest, *overrides]
    return recorded(folder, small_run(folder / "run", data, *arguments), **options)


def from_store(store: GatedStore, folder: Path, *overrides: str, **options: Any) -> Programs:
    """Start such a run from the store, with a cache in its folder."""
    variables = store.environment | options.pop("variables", {})
    cache = options.pop("cache", folder / "cache")
    return two_epochs(folder, cache, REMOTE, *overrides, environment=variables, **options)


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
    """The samples of a run from the local folder, whose epochs are whole."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with two_epochs(folder, many_shards) as programs:
        assert_succeed(programs)
    record = read_record(folder)
    assert_whole(record)
    return record


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(1, 2), *(slow(*case) for case in [(2, 0), (1, 0), (2, 3)])],
)
def test_epochs_are_whole_though_killed(
    store: GatedStore, undisturbed: Record, tmp_path: Path, ranks: int, workers: int
) -> None:
    """Promises 3, 4 and 8: a run killed at any batch resumes on 3 - ranks with the same batches and pixels;
    its cache is small.
    """
    overrides = SMALL_CACHE, f"train_loader.num_workers={workers}"
    kill_at = random.randint(BATCHES_PER_EPOCH + 1, 2 * BATCHES_PER_EPOCH - 1)
    kill = {"AT": f"batch_start {kill_at} kill"}
    with from_store(store, tmp_path, *overrides, ranks=ranks, variables=kill) as programs:
        wait_until(lambda: programs[0].poll() == -signal.SIGKILL, seconds=120)
        for other in programs[1:]:  # 18: without a traceback
            assert "another rank has ended" in failure(other, other.wait(60))
    assert kill_at - 1 <= max(read_record(tmp_path)) <= kill_at  # the other rank may have had the batch
    largest = 0
    with from_store(store, tmp_path, *overrides, ranks=3 - ranks) as programs:
        while any(program.poll() is None for program in programs):
            largest = max(largest, bytes_in(tmp_path / "cache"))
            time.sleep(0.02)
        assert_succeed(programs)
    assert read_record(tmp_path) == undisturbed
    assert CACHE_LIMIT // 2 < largest <= CACHE_LIMIT + (1 << 14), largest  # one shard, 4 kB, may be on its way


def bytes_in(folder: Path) -> int:
    """Return the size of a cache's shards."""
    total = 0
    for path in folder.glob("*.mds"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 0)])
@pytest.mark.slow
def test_epochs_are_whole_though_the_store_fails(
    store: GatedStore, undisturbed: Record, tmp_path: Path, ranks: int, workers: int
) -> None:
    """Promises 4 and 6: answers are cut, empty, errors, short, slow or wrong; later, the store is down for
    two seconds.
    """
    for number, fault in enumerate(FAULTS):
        store.faults[f"cloud/images/shard.{3 * number:05}.mds"] = [fault]
    with from_store(store, tmp_path, SMALL_CACHE, f"train_loader.num_workers={workers}", ranks=ranks) as programs:
        wait_for_batch(tmp_path, 2)
        with store.unreachable():
            time.sleep(2)
            assert [program.poll() for program in programs] == [None] * ranks
            assert len(read_record(tmp_path)) < 2 * BATCHES_PER_EPOCH
        assert_succeed(programs)
    assert not any(store.faults.values())
    assert read_record(tmp_path) == undisturbed


def wait_for_batch(folder: Path, batch: int) -> None:
    wait_until(lambda: any(f"\n{batch} " in file.read_text() for file in folder.glob("samples/*")), seconds=60)


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [(2, 0), slow(1, 0), slow(2, 3)],
)
def test_a_run_ends_if_the_store_stays_unreachable(store: GatedStore, tmp_path: Path, ranks: int, workers: int) -> None:
    """Promises 4, 6 and 18: it ends once train_loader.timeout is over, and one line names a shard."""
    overrides = SMALL_CACHE, f"train_loader.num_workers={workers}", "train_loader.timeout=3"
    with from_store(store, tmp_path, *overrides, ranks=ranks) as programs:
        wait_for_batch(tmp_path, 2)
        with store.unreachable():
            assert 0 not in [program.wait(60) for program in programs]
        said = "".join(program.stderr for program in programs)
    assert "s3://cloud/images/shard.000" in said
    assert "Could not connect to the endpoint URL" in said
    assert "Traceback" not in said
    assert len(read_record(tmp_path)) < 2 * BATCHES_PER_EPOCH


Damage = Callable[[bytes], bytes] | None


def named_shard(programs: list[Program]) -> None:
    """Check that a run ends in one line with the damaged shard; a missing one may be found before the run starts."""
    status = programs[0].wait(60)
    assert status in (1, 2)
    assert NAMED in failure(programs[0], status)


@pytest.mark.parametrize("damage", [None, flip_bit, slow(truncated)])
def test_a_damaged_shard_of_a_folder_is_named(many_shards: Path, tmp_path: Path, damage: Damage) -> None:
    """Promises 4, 5, 7 and 18: the shard is missing, altered or truncated; the folder stays as it is."""
    images = shutil.copytree(many_shards, tmp_path / "images")
    content = (images / NAMED).read_bytes()
    (images / NAMED).unlink()
    if damage is not None:
        (images / NAMED).write_bytes(damage(content))
    before = contents_of(images)
    with two_epochs(tmp_path, images, "train_loader.num_workers=1") as programs:
        named_shard(programs)
    assert contents_of(images) == before


@pytest.mark.parametrize("damage", [None, slow(flip_bit), slow(truncated)])
def test_a_damaged_shard_of_a_store_is_named(
    store: GatedStore, many_shards: Path, tmp_path: Path, damage: Damage
) -> None:
    """Promises 4, 5 and 18: the cache does not keep it."""
    content = damage and damage((many_shards / NAMED).read_bytes())
    overrides = SMALL_CACHE, "train_loader.timeout=3", "train_loader.num_workers=1"
    with store.replaced("cloud", f"images/{NAMED}", content), from_store(store, tmp_path, *overrides) as programs:
        named_shard(programs)
    assert not (tmp_path / "cache" / NAMED).exists()


def test_a_cached_shard_is_verified(store: GatedStore, many_shards: Path, undisturbed: Record, tmp_path: Path) -> None:
    """Promises 5 and 7: an altered shard of an earlier run is fetched again; a file that is not ours stays."""
    cache = shutil.copytree(many_shards, tmp_path / "cache")
    for name, damage in {"shard.00003.mds": flip_bit, "shard.00011.mds": truncated}.items():
        (cache / name).write_bytes(damage((cache / name).read_bytes()))
    (cache / "notes.txt").write_text("mine")
    with from_store(store, tmp_path, "train_loader.num_workers=1") as programs:
        assert_succeed(programs)
    assert read_record(tmp_path) == undisturbed
    assert (cache / "notes.txt").read_text() == "mine"
    for name in ("shard.00003.mds", "shard.00011.mds"):
        assert (cache / name).read_bytes() == (many_shards / name).read_bytes()


@pytest.mark.slow
def test_runs_beside_each_other_do_not_disturb(store: GatedStore, undisturbed: Record, tmp_path: Path) -> None:
    """Promise 7: each run has its own TMPDIR; of two in one cache, one may be refused in a line."""
    caches = {"alone": tmp_path / "own", "one": tmp_path / "cache", "two": tmp_path / "cache"}
    programs = {}
    with ExitStack() as runs:
        for name, cache in caches.items():
            folder, variables = tmp_path / name, {"TMPDIR": str(tmp_path / name / "tmp")}
            (folder / "tmp").mkdir(parents=True)
            options = SMALL_CACHE, "train_loader.num_workers=1"
            [programs[name]] = runs.enter_context(from_store(store, folder, *options, cache=cache, variables=variables))
        refused = [name for name, program in programs.items() if program.wait(120) != 0]
    assert refused in ([], ["one"], ["two"])
    for name in refused:
        assert "cache" in failure(programs[name], 2)
    assert all(read_record(tmp_path / name) == undisturbed for name in caches.keys() - {*refused})


@pytest.mark.slow
def test_each_node_fetches_its_own_share(store: GatedStore, tmp_path: Path) -> None:
    """Promise 8: there are two nodes of one rank each, with their own caches."""
    caches = tmp_path / "cache-${oc.env:NODE_RANK}"
    options = "max_duration=6ba", "train_loader.num_canonical_nodes=2"
    with from_store(store, tmp_path, *options, cache=caches, ranks=2, num_nodes=2) as nodes:
        assert_succeed(nodes)
    ids = Counter(i for samples in read_record(tmp_path).values() for i in samples)
    assert ids == Counter(range(NUM_IMAGES))
    shards = [{path.name for path in tmp_path.glob(f"cache-{rank}/*.mds")} for rank in (0, 1)]
    assert min(map(len, shards)) < len(shards[0] | shards[1])


@pytest.mark.parametrize("bad", ["truncated", "missing", "of another data set"])
def test_a_bad_index_in_the_store_is_one_line(store: GatedStore, many_shards: Path, tmp_path: Path, bad: str) -> None:
    """Promises 5 and 18: the index in the cache stays as it was."""
    index = (many_shards / "index.json").read_bytes()
    other = json.loads(index)
    other["shards"].pop()
    contents = {"truncated": truncated(index), "missing": None, "of another data set": json.dumps(other).encode()}
    cache = shutil.copytree(many_shards, tmp_path / "cache")
    arguments = small_run(tmp_path / "run", cache, REMOTE, "train_loader.timeout=2")
    with store.replaced("cloud", "images/index.json", contents[bad]):
        line = refused_run(arguments, environment=store.environment)
    assert str(cache) in line or "s3://cloud/images/index.json" in line
    assert (cache / "index.json").read_bytes() == index


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named(tmp_path: Path, workers: int) -> None:
    """Promises 4 and 18: by its number, from a worker, too."""
    data = write_mds(tmp_path / "data", [*(encoded_image(i) for i in range(31)), b"not a picture"])
    line = refused_run(small_run(tmp_path / "run", data, f"train_loader.num_workers={workers}"))
    assert "sample 31 of " in line
    assert "cannot decode as an image (13 bytes)" in line


def kill_once(holds: Callable[[], bool], *command: str | Path) -> None:
    """Start a command of d2v, and kill it and its workers when a condition holds."""
    program = start_python(*D2V, *command)
    wait_until(holds, seconds=60)
    family = family_of(program.pid)
    program.kill()
    assert_gone(family)


def test_a_conversion_is_whole_or_nothing(tmp_path: Path) -> None:
    """Promise 9: after two kills, the same command ends with the same bytes, which Streaming reads; a bad
    image is named.
    """
    images = [encoded_image(i, size=64) for i in range(8)]
    files = {f"{label}/{i:04}.jpg": images[i % 8] for i, label in product(range(500), "ab")}
    photos = write_files(tmp_path / "photos", files | {"b/0300.jpg": b"not a picture"})
    options = ("--resize", "48", "--shard-size", "100kb")
    refused = d2v("convert-images", photos, tmp_path / "refused", *options)
    assert "0300.jpg" in failure(refused, 2)
    assert not (tmp_path / "refused" / "index.json").exists()
    whole, out = ("convert-images", photos, tmp_path / "whole", *options, "--skip-unreadable"), tmp_path / "killed"
    ended = succeed(*whole, "--workers", "2")
    assert "0300.jpg" in ended.stdout + ended.stderr
    killed = (*whole[:2], out, *whole[3:], "--workers")
    for num_shards, workers in ((1, "2"), (3, "1")):
        kill_once(lambda num_shards=num_shards: len(list(out.glob("shard.*.mds"))) >= num_shards, *killed, workers)
        assert not (out / "index.json").exists()
    succeed(*killed, "3")
    assert contents_of(out) == contents_of(tmp_path / "whole")
    dataset: Any = StreamingDataset(local=str(out), shuffle=False, batch_size=1)
    assert len(dataset) == 999
    assert Counter(int(dataset[i]["label"]) for i in range(len(dataset))) == {0: 500, 1: 499}


# Sound: batches of similar length.

NUM_CLIPS = 100
CLIP_BATCHES_PER_EPOCH = NUM_CLIPS // BATCH_SIZE


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred clips of 0.05 to 0.5 s, most of them short; read-only."""
    lengths = 800 + 7000 * np.random.default_rng(0).beta(1, 3, NUM_CLIPS)
    clips = {f"{i:03}.flac": encoded_clip(i, int(length)) for i, length in enumerate(lengths)}
    return write_files(tmp_path_factory.mktemp("sounds"), clips)


@pytest.fixture(scope="module")
def clips(sounds: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The clips as MDS; read-only."""
    folder = tmp_path_factory.mktemp("clips") / "train"
    succeed("convert-audio", sounds, folder, "--labels", "none", "--shard-size", "60kb", "--workers", "1")
    return folder


def audio_run(folder: Path, data: Path, *overrides: str) -> list[str]:
    """Return the arguments of a small run with tests/golden's audio teacher."""
    teacher, crops = f"teacher.checkpoint={GOLDEN / 'audio_base.pt'}", "train_loader.crop_seconds=0.3"
    settings = teacher, crops, "callbacks={}", "compile=false", "student.depth=2", "train_loader.shuffle_block_size=64"
    _, *shared = small_run(folder / "run", data, *settings, *overrides)
    return [str(ROOT / "yamls" / "distill_audio.yaml"), *shared]


def train_audio(folder: Path, data: Path, *overrides: str, ranks: int = 1) -> None:
    """Train that run, which must succeed, and record its samples."""
    with recorded(folder, audio_run(folder, data, *overrides), ranks=ranks) as programs:
        assert_succeed(programs)


def train_audio_until_killed(folder: Path, data: Path, batch: int, *overrides: str, ranks: int = 1) -> None:
    """Train that run until rank 0 is killed before a batch."""
    kill = {"AT": f"batch_start {batch} kill"}
    with recorded(folder, audio_run(folder, data, *overrides), kill, ranks=ranks) as programs:
        wait_until(lambda: programs[0].poll() == -signal.SIGKILL, seconds=120)


@pytest.fixture(scope="module")
def uninterrupted_audio(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one process, with its samples: no epoch has one twice, and the next has another order."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train_audio(folder, clips)
    record = read_record(folder)
    assert sorted(record) == list(range(14))
    epochs = [[record[first + i] for i in range(CLIP_BATCHES_PER_EPOCH)] for first in (0, CLIP_BATCHES_PER_EPOCH)]
    for epoch in epochs:
        assert len({i for batch in epoch for i in batch}) == CLIP_BATCHES_PER_EPOCH * BATCH_SIZE
        assert [len(batch) for batch in epoch] == [BATCH_SIZE] * CLIP_BATCHES_PER_EPOCH
    assert [set(batch) for batch in epochs[0]] != [set(batch) for batch in epochs[1]]
    return folder


@pytest.mark.parametrize(
    ("ranks", "then", "workers"),
    [(1, 2, 3), (4, 1, 0), (2, 4, 1)],
)
@pytest.mark.slow
def test_a_killed_audio_run_goes_on_with_the_same_batches(
    clips: Path, uninterrupted_audio: Path, tmp_path: Path, ranks: int, then: int, workers: int
) -> None:
    """Promises 3, 4 and 10: killed at any batch, it resumes on other ranks, in microbatches, with the same
    batches and crops.
    """
    num_workers = f"train_loader.num_workers={workers}"
    train_audio_until_killed(tmp_path, clips, random.randint(3, 11), num_workers, ranks=ranks)
    train_audio(tmp_path, clips, num_workers, "device_train_microbatch_size=4", ranks=then)
    assert read_record(tmp_path) == read_record(uninterrupted_audio)
    assert_same_losses(losses_of(tmp_path / "run"), losses_of(uninterrupted_audio / "run"), num_steps=14)


def test_a_resumed_audio_run_ends_bit_for_bit_or_is_refused(
    clips: Path, uninterrupted_audio: Path, tmp_path: Path
) -> None:
    """Promises 4, 10 and 12: a resume within an epoch names a changed option of the loader, or the change has
    no effect.
    """
    train_audio_until_killed(tmp_path, clips, 9)
    changes = {"crop_seconds": "0.2", "shuffle": "false", "shuffle_block_size": "32", "num_canonical_nodes": "2"}
    line = refused_run(audio_run(tmp_path, clips, *(f"train_loader.{name}={value}" for name, value in changes.items())))
    assert [name for name in changes if f"train_loader.{name}: checkpoint has " not in line] == [], line
    free = [f"train_loader.{change}" for change in ("num_workers=1", "prefetch_factor=3", "timeout=60")]
    train_audio(tmp_path, clips, "save_interval=3ba", *free)
    assert read_record(tmp_path) == read_record(uninterrupted_audio)
    assert_same_student(tmp_path / "run", uninterrupted_audio / "run")
    assert losses_of(tmp_path / "run") == losses_of(uninterrupted_audio / "run")


@pytest.mark.slow
def test_an_audio_run_from_a_store(
    sounds: Path, uninterrupted_audio: Path, object_store: GatedStore, tmp_path: Path
) -> None:
    """Promises 4 and 6: clips that were converted to a store give the losses of a folder; without lengths,
    one line says so.
    """
    address, reach = object_store.create_bucket("sound"), object_store.environment
    source = [sounds, f"{address}/train", "--labels", "none", "--shard-size", "60kb"]
    succeed("convert-audio", *source, environment=reach)
    remote = f"train_loader.remote={address}/train"
    run_training(*audio_run(tmp_path, tmp_path / "cache", remote), environment=reach)
    assert_same_losses(losses_of(tmp_path / "run"), losses_of(uninterrupted_audio / "run"), 14)
    summary = object_store.objects("sound")["train/conversion.json"]
    with object_store.replaced("sound", "train/conversion.json", summary.replace(b'"lengths"', b'"other"')):
        line = refused_run(audio_run(tmp_path / "again", tmp_path / "new", remote), environment=reach)
    expected = f"expected the lengths of {NUM_CLIPS} samples in conversion.json, got 0"
    assert line.endswith(f"{address}/train: {expected}; convert the data set with d2v convert-audio"), line
