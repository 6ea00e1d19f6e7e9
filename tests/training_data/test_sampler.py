"""The order of samples: Streaming's, by length for clips, the same on any ranks, fixed by a checkpoint.

tests/promises/test_data.py has kills and workers.
"""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from streaming import StreamingDataset

from d2v_composer.config.resume import FIXED, keys_marked
from d2v_composer.config.schema import TrainerConfig, TrainLoaderConfig
from d2v_composer.data.audio import Audio
from d2v_composer.data.images import Images
from d2v_composer.data.modality import Modality, collate
from d2v_composer.sources.mds import Index
from d2v_composer.system.errors import InputError
from d2v_composer.training_data.loader import build_train_loader
from d2v_composer.training_data.sampler import EpochOrder, Sample, padded_sizes
from helpers import slow, write_mds
from streams import global_batches, open_images

SEED, EPOCH = 17, 3
Lengths = NDArray[np.int64]


def build_order(number: int, batch_size: int, lengths: Lengths | None = None, **options: Any) -> EpochOrder:
    num_shards = options.pop("num_shards", number // 100 + 1)
    shard_sizes = np.diff(np.arange(num_shards + 1) * number // num_shards)
    options |= {"global_batch_size": batch_size, "epoch_size": number // batch_size * batch_size}
    return EpochOrder(shard_sizes, lengths=lengths, seed=SEED, **options)


def batches_of(
    order: EpochOrder, nodes: int = 1, ranks_per_node: int = 1, first_batch: int = 0, epoch: int = EPOCH
) -> NDArray[np.int64]:
    """Return the samples of each batch of all ranks, (batches, batch size), from a batch of the epoch on."""
    size = order.global_batch_size
    return global_batches(order, epoch, nodes, ranks_per_node, first_batch * size).reshape(-1, size)


def assert_no_sample_twice(batches: NDArray[np.int64], num_samples: int) -> None:
    assert len(np.unique(batches)) == batches.size
    assert batches.max() < num_samples


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_order_is_streamings(many_shards: Path, shuffle: bool) -> None:
    options: dict[str, Any] = {"shuffle_block_size": 40, "epoch_size": 90, "num_canonical_nodes": 1}
    options["shuffle"] = shuffle
    theirs = StreamingDataset(
        local=str(many_shards), shuffle_algo="py1e", shuffle_seed=SEED, batch_size=10, predownload=16, **options
    )
    ours = open_images(many_shards, seed=SEED, **options)
    for epoch in range(3):
        samples = list(ours.order)
        assert {sample.epoch for sample in samples} == {epoch}
        images = [ours.shards[sample.sample_id]["image"] for sample in samples]
        assert images == [sample["image"] for sample in theirs]


def test_another_seed_crops_otherwise(many_shards: Path) -> None:
    seeds = (SEED, SEED, SEED + 1)
    first, again, other = (open_images(many_shards, seed=seed)[Sample(0, 0, ())]["image"] for seed in seeds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("num_shards", "num_samples"), [(2_000, 25_600), slow(100_000, 1_281_167)])
def test_reads_each_sample_once_on_512_ranks(num_shards: int, num_samples: int) -> None:
    """And 384 ranks resume in the middle of the epoch, with 8 samples of a batch each instead of 6."""
    order = build_order(num_samples, 3072, num_shards=num_shards, num_canonical_nodes=64)
    batches = batches_of(order, nodes=64, ranks_per_node=8)
    assert len(batches) == num_samples // 3072
    assert_no_sample_twice(batches, num_samples)
    trained = len(batches) // 2
    rest = batches_of(order, nodes=48, ranks_per_node=8, first_batch=trained)
    assert np.array_equal(np.sort(rest), np.sort(batches[trained:]))


# By length.


def read_speech(rng: np.random.Generator, number: int) -> Lengths:
    """As LibriSpeech: 1 to 16 s, mostly more than 12."""
    lengths = np.where(rng.random(number) < 0.8, rng.uniform(12, 16.5, number), rng.uniform(1.3, 12, number))
    return (16_000 * lengths).astype(int)


def prompts(rng: np.random.Generator, number: int) -> Lengths:
    """As words and short sentences: 0.3 to 8 s, mostly less than 2."""
    return (16_000 * np.exp(rng.normal(0.2, 0.5, number)).clip(0.3, 8)).astype(int)


@pytest.mark.parametrize("canonical_nodes", [1, 2, 4])
def test_an_epoch_has_each_sample_once_and_the_same_batches_on_any_ranks(canonical_nodes: int) -> None:
    """Promises 3, 4 and 8: also in an epoch that is resumed after any batch; a node keeps its part of the order."""
    lengths = prompts(np.random.default_rng(1), 1000)
    order = build_order(1000, 48, lengths, shuffle_block_size=200, num_canonical_nodes=canonical_nodes)
    expected = np.sort(batches_of(order))
    assert expected.shape == (20, 48)
    assert_no_sample_twice(expected, 1000)
    for nodes, ranks in [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1), (1, 3)]:
        if canonical_nodes % nodes:
            continue
        for first in (0, 1, 7, 19):
            assert np.array_equal(np.sort(batches_of(order, nodes, ranks, first)), expected[first:])
        of_ranks, of_nodes = (np.sort(global_batches(order, EPOCH, nodes, number)) for number in (ranks, 1))
        assert np.array_equal(of_ranks, of_nodes)
    order.seed += 1
    assert not np.array_equal(np.sort(batches_of(order)), expected)


def test_a_nodes_samples_are_its_part_of_streamings_order() -> None:
    """Promise 8: so its shards are too."""
    lengths = prompts(np.random.default_rng(1), 4000)
    options = {"shuffle_block_size": 500, "num_canonical_nodes": 4}
    parts = [global_batches(build_order(4000, 64, sizes, **options), EPOCH, 4, 1) for sizes in (lengths, None)]
    for node in range(4):
        assert set(parts[0][:, node].ravel()) == set(parts[1][:, node].ravel())
        # Also window by window: no shard is needed much earlier or later than in Streaming's order.
        assert set(parts[0][:7, node].ravel()) == set(parts[1][:7, node].ravel())


class Clips(NamedTuple):
    """The lengths of all clips, and those in each batch of an epoch, (batches, batch size), in our order or another."""

    lengths: Lengths
    by_length: Lengths
    in_streamings_order: Lengths


# How lengths are drawn, the number of clips, the longest in seconds, the batch size and the canonical nodes.
CLIPS = [(read_speech, 60_000, 15.6, 64, 1), (read_speech, 60_000, 15.6, 128, 4), (prompts, 4000, 5, 32, 1)]


@pytest.fixture(scope="module", params=CLIPS)
def clips(request: pytest.FixtureRequest) -> Clips:
    draw, number, longest, batch_size, nodes = request.param
    lengths = np.minimum(draw(np.random.default_rng(2), number), int(16_000 * longest))
    options = {"shuffle_block_size": 8192, "num_canonical_nodes": nodes}
    batches = (batches_of(build_order(number, batch_size, known, **options)) for known in (lengths, None))
    return Clips(lengths, *(lengths[samples][:300] for samples in batches))


def padded_lengths(batches: Lengths, sizes: Sequence[int]) -> Lengths:
    """Return the length to which each batch is padded."""
    return np.array([collate([torch.empty(0, length) for length in batch], sizes)[0].shape[-1] for batch in batches])


def share_of_padding(batches: Lengths, padded: Lengths) -> float:
    """Return the share of frames, of 320 samples, that are padding."""
    frames, padded_frames = (lengths // 320 - 1 for lengths in (batches, padded))
    return 1 - frames.sum() / (padded_frames.sum() * batches.shape[1])


@pytest.mark.parametrize("is_compiled", [False, True])
def test_little_is_padding(clips: Clips, is_compiled: bool) -> None:
    sizes = padded_sizes(clips.lengths) if is_compiled else []
    share = share_of_padding(clips.by_length, padded_lengths(clips.by_length, sizes))
    assert share < 0.1
    assert share < share_of_padding(clips.in_streamings_order, clips.in_streamings_order.max(axis=1)) / 2


def test_a_compiled_model_sees_few_lengths(clips: Clips) -> None:
    assert len(np.unique(padded_lengths(clips.by_length, padded_sizes(clips.lengths)))) <= 16


def lengths_by_time(epoch: int) -> NDArray[np.float64]:
    """Return the mean length of each batch in an epoch's first four windows, (windows, batches)."""
    batch_size, window = 32, 128
    lengths = read_speech(np.random.default_rng(2), 20_000)
    order = build_order(20_000, batch_size, lengths, shuffle_block_size=window * batch_size)
    return lengths[batches_of(order, epoch=epoch)].mean(axis=1)[: 4 * window].reshape(4, window)


def test_batches_of_all_lengths_come_at_all_times() -> None:
    for window in lengths_by_time(EPOCH):
        thirds = [batches.mean() for batches in np.array_split(window, 3)]
        assert max(thirds) < 1.15 * min(thirds)


def test_lengths_come_at_other_times_in_each_window_and_in_each_epoch() -> None:
    windows = np.concatenate([lengths_by_time(EPOCH), lengths_by_time(EPOCH + 1)])
    assert np.triu(np.corrcoef(windows), 1).max() < 0.5  # of any two


def test_without_shuffle_the_order_is_that_of_the_samples() -> None:
    order = build_order(500, 20, prompts(np.random.default_rng(1), 500), shuffle=False)
    assert batches_of(order).ravel().tolist() == list(range(500))


def test_collate_pads_to_a_size() -> None:
    samples = [torch.ones(3), torch.ones(5)]
    inputs, lengths = collate(samples, [4, 6, 9])
    assert inputs.tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert lengths.tolist() == [3, 5]
    assert [tensor.shape[-1] for tensor in collate(samples, [4])] == [5, 2]  # longer than all sizes
    assert len(collate([torch.ones(4), torch.ones(4)], [4])) == 1


def open_clips(folder: Path, summary: str | None, count: int = 3) -> Index:
    """Write clips, and the summary of their conversion; return their index."""
    write_mds(folder, [bytes(600)] * count)
    if summary is not None:
        (folder / "conversion.json").write_text(summary)
    return Index(folder, Audio(), "image")


@pytest.mark.parametrize(
    ("summary", "problem"),
    [
        (None, "expected the lengths of 3 samples in conversion.json, got 0; convert the data set with d2v convert-"),
        ('{"clips": 3}', "got 0; convert"),
        ('{"lengths": [1, 2]}', "got 2; convert"),
        ('{"lengths": [1, 2', "conversion.json"),
        ('{"lengths": [1, 2, "long"]}', "conversion.json"),
        ("[]", "conversion.json"),
    ],
)
def test_lengths_must_be_there(tmp_path: Path, summary: str | None, problem: str) -> None:
    with pytest.raises(InputError, match=rf"\A.*{problem}.*\Z"):
        _ = open_clips(tmp_path, summary).lengths


def test_other_lengths_are_another_data_set(tmp_path: Path) -> None:
    summaries = [json.dumps({"lengths": lengths}) for lengths in ([1, 2, 3], [2, 1, 3])]
    digests = {open_clips(tmp_path / str(i), summary).describe()["sha256"] for i, summary in enumerate(summaries)}
    assert len(digests) == 2


# What a checkpoint fixes.

# Fields that leave the order alone, each with another value than usual.
FREE: dict[str, Any] = {"num_workers": 1, "prefetch_factor": 5, "timeout": 9.0}
FREE_FOR_IMAGES: dict[str, Any] = {"crop_scale": (0.5, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}
LOCATION = {"local", "remote", "cache_limit"}  # of the data, whose sha256 the run compares


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 clips of many lengths."""
    lengths = np.random.default_rng(0).integers(800, 8000, 400).tolist()
    return open_clips(tmp_path_factory.mktemp("clips"), json.dumps({"lengths": lengths}), 400).folder


def order_of(folder: Path, modality: type[Modality], is_compiled: bool = False, **changes: Any) -> list[int]:
    """Return the samples of two epochs."""
    loader = TrainLoaderConfig(local=str(folder), **{"column": "image", "num_workers": 0, **changes})
    config = TrainerConfig(seed=SEED, precision="fp32", global_train_batch_size=16)
    train_loader: Any = build_train_loader(config, loader, Index(folder, modality(), "image"), is_compiled=is_compiled)
    return [sample.sample_id for _ in range(2) for sample in train_loader.sampler]


def test_each_field_is_free_or_fixed_by_a_checkpoint() -> None:
    fixed = keys_marked(TrainLoaderConfig(local="x"), FIXED)
    assert sorted([*FREE, *FREE_FOR_IMAGES, *LOCATION, *fixed]) == sorted(TrainLoaderConfig.model_fields)


@pytest.mark.parametrize(("modality", "field"), [*product([Images, Audio], FREE), *product([Images], FREE_FOR_IMAGES)])
def test_a_free_field_leaves_the_order_alone(modality: type[Modality], field: str, sounds: Path) -> None:
    change = {field: (FREE | FREE_FOR_IMAGES)[field]}
    assert order_of(sounds, modality, **change) == order_of(sounds, modality)


@pytest.mark.parametrize("modality", [Images, Audio])
def test_the_block_size_changes_the_order_and_compilation_does_not(modality: type[Modality], sounds: Path) -> None:
    usual = order_of(sounds, modality)
    assert order_of(sounds, modality, shuffle_block_size=256) != usual
    assert order_of(sounds, modality, is_compiled=True) == usual
