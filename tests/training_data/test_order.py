"""The order of samples: Streaming's, by length for clips, the same on any ranks, fixed by a checkpoint.

tests/promises/test_data.py has kills and workers.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from streaming import StreamingDataset

from d2v_composer.config.schema import TrainerConfig, TrainLoaderConfig
from d2v_composer.data import MODALITIES
from d2v_composer.data.audio import Audio
from d2v_composer.data.images import Images
from d2v_composer.data.modality import Modality, collate
from d2v_composer.runs.trainer import FIXED_IN_ANY_RUN
from d2v_composer.sources.mds import Index
from d2v_composer.system.errors import InputError
from d2v_composer.training_data.loader import build_train_loader
from d2v_composer.training_data.order import EpochOrder, Sample, padded_sizes
from helpers import write_mds
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
        assert {sample.view for sample in samples} == {epoch}
        images = [ours.shards[sample.sample_id]["image"] for sample in samples]
        assert images == [sample["image"] for sample in theirs]


def test_another_seed_crops_otherwise(many_shards: Path) -> None:
    seeds = (SEED, SEED, SEED + 1)
    first, again, other = (open_images(many_shards, seed=seed)[Sample(0, 0, ())]["image"] for seed in seeds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("num_shards", "num_samples"), [(2_000, 25_600), pytest.param(100_000, 1_281_167, marks=pytest.mark.slow)]
)
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
    """3, 4, 8: also in an epoch that is resumed after any batch; a node keeps its part of the order."""
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
    """8: so its shards are too."""
    lengths = prompts(np.random.default_rng(1), 4000)
    options = {"shuffle_block_size": 500, "num_canonical_nodes": 4}
    parts = [global_batches(build_order(4000, 64, sizes, **options), EPOCH, 4, 1) for sizes in (lengths, None)]
    for node in range(4):
        assert set(parts[0][:, node].ravel()) == set(parts[1][:, node].ravel())
        # Also window by window: no shard is needed much earlier or later than in Streaming's order.
        assert set(parts[0][:7, node].ravel()) == set(parts[1][:7, node].ravel())


@pytest.mark.parametrize(
    ("draw", "number", "batch_size", "crop", "nodes"),
    [(read_speech, 60_000, 64, 249_600, 1), (read_speech, 60_000, 128, 249_600, 4), (prompts, 4000, 32, 80_000, 1)],
)
@pytest.mark.parametrize("is_compiled", [False, True])
def test_little_is_padding(
    draw: Callable[..., Lengths], number: int, batch_size: int, crop: int, nodes: int, is_compiled: bool
) -> None:
    """At most 10 % of the frames, for a compiled model with at most 16 different lengths."""
    lengths = np.minimum(draw(np.random.default_rng(2), number), crop)
    order = build_order(number, batch_size, lengths, shuffle_block_size=8192, num_canonical_nodes=nodes)
    batches = lengths[batches_of(order)]
    sizes = padded_sizes(lengths) if is_compiled else []
    padded = [collate([torch.empty(0, length) for length in batch], sizes)[0].shape[-1] for batch in batches[:400]]
    assert not is_compiled or len(set(padded)) <= 16
    frames, valid = (np.array(samples) // 320 - 1 for samples in (padded, batches[:400]))
    share = 1 - valid.sum() / (frames.sum() * batch_size)
    assert share < 0.1
    order.lengths = None
    unsorted = lengths[order.draw(EPOCH)].reshape(-1, batch_size)
    assert 1 - unsorted.mean() / unsorted.max(axis=1).mean() > 2 * share


def test_batches_of_all_lengths_come_at_all_times() -> None:
    """And at other times in each window and in each epoch."""
    lengths = read_speech(np.random.default_rng(2), 20_000)
    order = build_order(20_000, 32, lengths, shuffle_block_size=128 * 32)
    epochs = [lengths[batches_of(order, epoch=epoch)] for epoch in (EPOCH, EPOCH + 1)]
    thirds = [part.mean() for part in np.array_split(epochs[0][:120], 3)]
    assert max(thirds) < 1.15 * min(thirds)
    windows = np.concatenate([batches[: 4 * 128].mean(axis=1).reshape(4, 128) for batches in epochs])
    assert np.triu(np.corrcoef(windows), 1).max() < 0.5


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

# Another value of each field of train_loader. Where the data lie does not matter: the run compares their sha256.
CHANGES: dict[str, Any] = {
    "num_workers": 1,
    "prefetch_factor": 5,
    "crop_scale": (0.5, 1.0),
    "crop_ratio": (1.0, 1.0),
    "flip": 0.0,
    "crop_seconds": 0.1,
    "timeout": 9.0,
    "shuffle": False,
    "shuffle_block_size": 256,
    "num_canonical_nodes": 2,
    "column": "other",
    "views": 1,
}
LOCATION = {"local", "remote", "cache_limit"}


def order_of(index: Index, is_compiled: bool = False, **changes: Any) -> list[int]:
    """Return the samples of two epochs."""
    loader = TrainLoaderConfig(local=str(index.folder), **{"column": "image", "num_workers": 0, **changes})
    config = TrainerConfig(seed=SEED, precision="fp32", global_train_batch_size=16)
    train_loader: Any = build_train_loader(config, loader, index, is_compiled=is_compiled)
    return [sample.sample_id for _ in range(2) for sample in train_loader.sampler]


@pytest.mark.parametrize("modality", [Images(32), Audio()], ids=["image", "audio"])
def test_a_field_is_fixed_or_leaves_the_order_alone(modality: Modality, tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(800, 8000, 400).tolist()
    open_clips(tmp_path, json.dumps({"lengths": lengths}), 400)
    index = Index(tmp_path, modality, "image")
    before = order_of(index)
    assert CHANGES.keys() | LOCATION == TrainLoaderConfig.model_fields.keys()
    refused = frozenset().union(*(kind.options for kind in MODALITIES.values())) - modality.options
    fixed = {name for name in CHANGES if f"config.train_loader.{name}" in FIXED_IN_ANY_RUN}
    free = {name: CHANGES[name] for name in CHANGES.keys() - fixed - refused}
    assert len(free) > 2
    for name, value in free.items():
        assert order_of(index, **{name: value}) == before, name
    assert order_of(index, is_compiled=True) == before
    assert order_of(index, shuffle_block_size=256) != before
