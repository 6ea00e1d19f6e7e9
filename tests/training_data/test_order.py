"""The order of samples: Streaming's, also on 512 ranks; tests/promises/test_data.py has kills and workers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import StreamingDataset

from d2v_composer.training_data.order import EpochOrder, Sample
from streams import global_batches, open_images

SEED = 17
RANKS_PER_NODE, NODES, FEWER_NODES = 8, 64, 48
# 6 samples a rank on 512 ranks, 8 on 384.
GLOBAL_BATCH = 3072
EPOCH = 3


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


@pytest.mark.parametrize(
    ("num_shards", "num_samples"), [(2_000, 25_600), pytest.param(100_000, 1_281_167, marks=pytest.mark.slow)]
)
def test_reads_each_sample_once_on_512_ranks(num_shards: int, num_samples: int) -> None:
    """And 384 ranks resume in the middle of the epoch."""
    num_batches = num_samples // GLOBAL_BATCH
    sizes = np.diff(np.arange(num_shards + 1) * num_samples // num_shards)
    options: dict[str, Any] = {"global_batch_size": GLOBAL_BATCH, "epoch_size": num_batches * GLOBAL_BATCH}
    order = EpochOrder(sizes, num_canonical_nodes=NODES, seed=SEED, **options)
    batches = global_batches(order, EPOCH, NODES, RANKS_PER_NODE).reshape(-1, GLOBAL_BATCH)
    assert len(batches) == num_batches
    seen = np.bincount(batches.ravel(), minlength=num_samples)
    assert len(seen) == num_samples
    assert seen.max() == 1

    trained = num_batches // 2
    rest = global_batches(order, EPOCH, FEWER_NODES, RANKS_PER_NODE, trained * GLOBAL_BATCH).reshape(-1, GLOBAL_BATCH)
    assert np.array_equal(np.sort(rest), np.sort(batches[trained:]))
