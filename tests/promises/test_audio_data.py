"""Promises 3 to 10 with sound: each clip once an epoch, in batches of similar length; resumption.

Conversions are those of images, tests/promises/test_data.py; what is sound's alone is in tests/conversion.
"""

import random
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gated_store import GatedStore
from helpers import (
    GOLDEN,
    ROOT,
    assert_same_losses,
    assert_same_student,
    assert_succeed,
    encoded_clip,
    losses_of,
    read_record,
    recorded,
    refused_run,
    run_training,
    succeed,
    wait_until,
    write_files,
)

NUM_CLIPS, BATCH_SIZE = 100, 16
BATCHES_PER_EPOCH = NUM_CLIPS // BATCH_SIZE


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


def small_audio_run(folder: Path, data: Path, *overrides: str) -> list[str]:
    """Return the arguments of a tiny run: tests/golden's audio teacher, 14 batches, 7 checkpoints, no retrieval."""
    return [
        str(ROOT / "yamls" / "distill_audio.yaml"),
        f"teacher.checkpoint={GOLDEN / 'audio_base.pt'}",
        f"train_loader.local={data}",
        "train_loader.crop_seconds=0.3",
        f"save_folder={folder}",
        "retrieval.datasets={}",
        "callbacks={}",
        "precision=fp32",
        "compile=false",
        "max_duration=14ba",
        f"global_train_batch_size={BATCH_SIZE}",
        "scheduler.t_warmup=4ba",
        "save_interval=2ba",
        "student.depth=2",
        "train_loader.num_workers=0",
        "train_loader.shuffle_block_size=64",
        "report=false",
        *overrides,
    ]


def train(folder: Path, data: Path, *overrides: str, ranks: int = 1) -> None:
    """Train a run in ``folder``/run, which must succeed, and record its samples."""
    with recorded(folder, small_audio_run(folder / "run", data, *overrides), ranks=ranks) as programs:
        assert_succeed(programs)


def train_until_killed(folder: Path, data: Path, batch: int, *overrides: str, ranks: int = 1) -> None:
    """Train that run until rank 0 is killed before a batch."""
    kill = {"AT": f"batch_start {batch} kill"}
    with recorded(folder, small_audio_run(folder / "run", data, *overrides), kill, ranks=ranks) as programs:
        wait_until(lambda: programs[0].poll() == -signal.SIGKILL, seconds=120)


@pytest.fixture(scope="module")
def uninterrupted(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one process; beside it, its samples."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    train(folder, clips)
    return folder


def test_an_epoch_has_no_sample_twice_and_full_batches(uninterrupted: Path) -> None:
    """3, 4: also the next one, which has another order."""
    record = read_record(uninterrupted)
    assert sorted(record) == list(range(14))
    epochs = [list(range(first, first + BATCHES_PER_EPOCH)) for first in (0, BATCHES_PER_EPOCH)]
    for epoch in epochs:
        ids = Counter(i for batch in epoch for i in record[batch])
        assert max(ids.values()) == 1
        assert len(ids) == BATCHES_PER_EPOCH * BATCH_SIZE
    assert [set(record[batch]) for batch in epochs[0]] != [set(record[batch]) for batch in epochs[1]]


@pytest.mark.parametrize(
    ("ranks", "then", "workers"),
    [(1, 2, 3), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(4, 1, 0), (2, 4, 1)])],
)
def test_a_killed_run_goes_on_with_the_same_batches(
    clips: Path, uninterrupted: Path, tmp_path: Path, ranks: int, then: int, workers: int
) -> None:
    """3, 4, 10: killed at a random batch, resumed on other ranks and in microbatches: same batches and crops."""
    num_workers = f"train_loader.num_workers={workers}"
    train_until_killed(tmp_path, clips, random.randint(3, 11), num_workers, ranks=ranks)
    train(tmp_path, clips, num_workers, "device_train_microbatch_size=4", ranks=then)
    assert read_record(tmp_path) == read_record(uninterrupted)
    assert_same_losses(losses_of(tmp_path / "run"), losses_of(uninterrupted / "run"), num_steps=14)


def test_a_resume_ends_bit_for_bit_or_is_refused(clips: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """4, 10, 12: within an epoch, with each option of the loader changed: it is named, or changes nothing."""
    train_until_killed(tmp_path, clips, 9)
    changes = {"crop_seconds": "0.2", "shuffle": "false", "shuffle_block_size": "32", "num_canonical_nodes": "2"}
    overrides = [f"train_loader.{name}={value}" for name, value in changes.items()]
    line = refused_run(small_audio_run(tmp_path / "run", clips, *overrides))
    assert [name for name in changes if f"train_loader.{name}: checkpoint has " not in line] == [], line
    free = [f"train_loader.{change}" for change in ("num_workers=1", "prefetch_factor=3", "timeout=60")]
    train(tmp_path, clips, "save_interval=3ba", *free)
    assert read_record(tmp_path) == read_record(uninterrupted)
    assert_same_student(tmp_path / "run", uninterrupted / "run")
    assert losses_of(tmp_path / "run") == losses_of(uninterrupted / "run")


@pytest.mark.slow
def test_a_run_from_a_store(sounds: Path, uninterrupted: Path, object_store: GatedStore, tmp_path: Path) -> None:
    """4, 6: converted to a store and trained from it, the losses of a folder; without the lengths, one line."""
    address, reach = object_store.create_bucket("sound"), object_store.environment
    source = [sounds, f"{address}/train", "--labels", "none", "--shard-size", "60kb"]
    succeed("convert-audio", *source, environment=reach)
    arguments = [f"train_loader.remote={address}/train"]
    run_training(*small_audio_run(tmp_path / "run", tmp_path / "cache", *arguments), environment=reach)
    assert_same_losses(losses_of(tmp_path / "run"), losses_of(uninterrupted / "run"), 14)
    summary = object_store.objects("sound")["train/conversion.json"]
    with object_store.replaced("sound", "train/conversion.json", summary.replace(b'"lengths"', b'"other"')):
        line = refused_run(small_audio_run(tmp_path / "again", tmp_path / "new", *arguments), environment=reach)
    expected = f"expected the lengths of {NUM_CLIPS} samples in conversion.json, got 0"
    assert line.endswith(f"{address}/train: {expected}; convert the data set with d2v convert-audio"), line
