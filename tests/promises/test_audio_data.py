"""Promises 3 to 10 with sound: each clip once an epoch, in batches of similar length; whole conversions; resumption."""

import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import StreamingDataset

from gated_store import GatedStore
from helpers import (
    D2V,
    GOLDEN,
    ROOT,
    assert_gone,
    assert_same_losses,
    assert_same_student,
    assert_succeed,
    encoded_clip,
    failure,
    family_of,
    losses_of,
    read_record,
    run_command,
    run_training,
    start_python,
    started_ranks,
    succeed,
    traced,
    train_command,
    train_until_killed,
    wait_until,
)
from programs.preloaded import Program

NUM_CLIPS, BATCH_SIZE = 100, 16
BATCHES_PER_EPOCH = NUM_CLIPS // BATCH_SIZE


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred clips of 0.05 to 0.5 s, most of them short; read-only."""
    folder = tmp_path_factory.mktemp("sounds")
    lengths = 800 + 7000 * np.random.default_rng(0).beta(1, 3, NUM_CLIPS)
    for i, length in enumerate(lengths):
        (folder / f"{i:03}.flac").write_bytes(encoded_clip(i, int(length)))
    return folder


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


@pytest.fixture(scope="module")
def uninterrupted(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in one process; beside it, its samples."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with recorded(folder, clips) as programs:
        assert_succeed(programs)
    return folder


@contextmanager
def recorded(
    folder: Path, data: Path, *overrides: str, ranks: int = 1, environment: dict[str, str] | None = None
) -> Iterator[list[Program]]:
    """Start a run that records its samples in ``folder``/samples."""
    variables = {"SAMPLES": str(folder / "samples"), **(environment or {})}
    command = traced(small_audio_run(folder / "run", data, *overrides))
    with started_ranks(*command, ranks=ranks, environment=variables) as programs:
        yield programs


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
    [(1, 2, 3), *(pytest.param(*each, marks=pytest.mark.slow) for each in [(4, 1, 0), (2, 4, 1)])],
)
def test_a_killed_run_goes_on_with_the_same_batches(
    clips: Path, uninterrupted: Path, tmp_path: Path, ranks: int, then: int, workers: int
) -> None:
    """3, 4, 10: killed at a random batch and resumed on another number of ranks: same batches and crops."""
    options = [f"train_loader.num_workers={workers}"]
    kill = {"AT": f"batch_start {random.randint(3, 11)} kill"}
    with recorded(tmp_path, clips, *options, ranks=ranks, environment=kill) as programs:
        wait_until(lambda: any(program.poll() == -signal.SIGKILL for program in programs), seconds=120)
    with recorded(tmp_path, clips, *options, ranks=then) as programs:
        assert_succeed(programs)
    assert read_record(tmp_path) == read_record(uninterrupted)
    assert_same_losses(losses_of(tmp_path / "run"), losses_of(uninterrupted / "run"), num_steps=14)


def test_a_resume_keeps_the_order_or_is_refused(clips: Path, uninterrupted: Path, tmp_path: Path) -> None:
    """4, 12: within an epoch, with each option of the loader changed: it is named, or no clip comes twice or never."""
    with recorded(tmp_path, clips, environment={"AT": "batch_start 9 kill"}) as [program]:
        assert program.wait(120) == -signal.SIGKILL
    refused = {"crop_seconds": "0.2", "shuffle": "false", "shuffle_block_size": "32", "num_canonical_nodes": "2"}
    with recorded(tmp_path, clips, *(f"train_loader.{name}={value}" for name, value in refused.items())) as [program]:
        assert program.wait(60) == 2
    line = failure(program, 2)
    assert [name for name in refused if f"train_loader.{name}: checkpoint has " not in line] == [], line
    free = ("num_workers=1", "prefetch_factor=3", "timeout=60")
    options = ("device_train_microbatch_size=4", "save_interval=3ba", *(f"train_loader.{each}" for each in free))
    with recorded(tmp_path, clips, *options) as programs:
        assert_succeed(programs)
    assert read_record(tmp_path) == read_record(uninterrupted)


@pytest.mark.parametrize("batch", [3, *(pytest.param(batch, marks=pytest.mark.slow) for batch in (6, 9))])
def test_a_killed_run_ends_bit_for_bit(clips: Path, uninterrupted: Path, tmp_path: Path, batch: int) -> None:
    """10: with the bits of the run that was not killed."""
    arguments = small_audio_run(tmp_path, clips)
    train_until_killed(arguments, f"batch_start {batch}")
    assert len(losses_of(tmp_path)) == batch
    run_training(*arguments)
    assert_same_student(tmp_path, uninterrupted / "run")
    assert losses_of(tmp_path) == losses_of(uninterrupted / "run")


def test_a_data_set_without_lengths_is_refused(clips: Path, tmp_path: Path) -> None:
    """18: in one line that says what to do."""
    data = shutil.copytree(clips, tmp_path / "clips")
    (data / "conversion.json").unlink()
    with recorded(tmp_path, data) as [program]:
        assert program.wait(60) == 2
    assert f"{data}: expected the lengths of 100 samples" in failure(program, 2)
    assert "convert the data set with d2v convert-audio" in failure(program, 2)


def test_a_conversion_is_whole_or_nothing(sounds: Path, tmp_path: Path) -> None:
    """9: killed twice, the same command goes on to the same bytes, which Streaming reads."""
    arguments = ["--labels", "none", "--shard-size", "20kb"]
    succeed("convert-audio", sounds, tmp_path / "whole", *arguments, "--workers", "2")
    out = tmp_path / "killed"
    for number in (1, 5):
        program = start_python(*D2V, "convert-audio", sounds, out, *arguments, "--workers", "1")
        wait_until(lambda number=number: len(list(out.glob("shard.*.mds"))) >= number, seconds=60)
        family = family_of(program.pid)
        program.kill()
        program.wait(30)
        assert_gone(family)
        assert not (out / "index.json").exists()
    succeed("convert-audio", sounds, out, *arguments, "--workers", "3")
    trees = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tmp_path / "whole", out)]
    assert trees[0] == trees[1]
    dataset: Any = StreamingDataset(local=str(out), shuffle=False, batch_size=1)
    originals = {path.read_bytes() for path in sounds.iterdir()}
    assert {dataset[i]["audio"] for i in range(len(dataset))} == originals


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
        command = train_command(small_audio_run(tmp_path / "again", tmp_path / "new", *arguments))
        line = failure(run_command(*command, environment=reach), 2)
    expected = f"expected the lengths of {NUM_CLIPS} samples in conversion.json, got 0"
    assert line.endswith(f"{address}/train: {expected}; convert the data set with d2v convert-audio"), line
