"""The samples of an epoch and the shards of a node, compared with what Streaming draws, shuffles and partitions."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.partition import get_partitions
from streaming.base.shuffle import get_shuffle

from d2v_composer.data.streaming import Share, draw_samples, shards_of_node
from streams import open_images

SEED = 17
BLOCK = 64


def shard_sizes(num_shards: int, smallest: int, largest: int) -> NDArray[np.int64]:
    return np.random.default_rng((num_shards, smallest, largest)).integers(smallest, largest + 1, num_shards)


def streamings_draw(
    sizes: NDArray[np.int64], num_drawn: int, epoch: int, changes: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The samples that Streaming 0.13 draws from one stream."""
    dataset = SimpleNamespace(
        shuffle_seed=SEED,
        sampling_method="balanced",
        sampling_granularity=1,
        epoch_seed_change=changes,
        num_streams=1,
        streams=[SimpleNamespace(choose=num_drawn)],
        shard_offset_per_stream=np.array([0]),
        shards_per_stream=np.array([len(sizes)]),
        samples_per_shard=sizes,
        sample_offset_per_shard=sizes.cumsum() - sizes,
    )
    return StreamingDataset.resample_streams(dataset, epoch)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("changes", [True, False])
@pytest.mark.parametrize(
    ("num_shards", "smallest", "largest", "batch"),
    [(1, 97, 97, 16), (30, 1, 5, 16), (30, 1, 5, 1000), (7, 3, 90, 32), (400, 60, 70, 256), (90, 1165, 1165, 256)],
)
def test_draws_the_samples_that_streaming_draws(
    num_shards: int, smallest: int, largest: int, batch: int, changes: bool
) -> None:
    sizes = shard_sizes(num_shards, smallest, largest)
    num_samples = int(sizes.sum())
    for num_drawn in {max(1, num_samples // batch * batch), num_samples, max(1, num_samples // 2)}:
        for epoch in (0, 1, 5):
            expected = streamings_draw(sizes, num_drawn, epoch, changes)
            ours = draw_samples(sizes, num_drawn, SEED + epoch if changes else SEED, SEED + epoch)
            for mine, theirs in zip(ours, expected, strict=True):
                assert mine.dtype == theirs.dtype
                assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_data_set_draws_the_samples_that_streaming_draws(many_shards: Path, shuffle: bool) -> None:
    dataset = open_images(many_shards, batch_size=10, epoch_size=90)
    dataset.epoch_seed_change = shuffle
    for epoch in range(3):
        for mine, theirs in zip(
            dataset.resample_streams(epoch), StreamingDataset.resample_streams(dataset, epoch), strict=True
        ):
            assert np.array_equal(mine, theirs)


def shards_read(
    sizes: NDArray[np.int64], num_drawn: int, epoch: int, num_nodes: int, parts: int, shuffle: bool
) -> list[set[int]]:
    """The shards of each node's samples, as Streaming orders and partitions an epoch, in 2 ranks of 2 workers each."""
    batch = 32 // num_nodes // 2
    units, drawn = draw_samples(sizes, num_drawn, SEED + epoch, SEED + epoch)
    partition = get_partitions("relaxed", num_drawn, parts, num_nodes, 2, 2, batch, 0, None)
    if shuffle:
        partition = np.where(partition < 0, -1, get_shuffle("py1e", units, parts, SEED, epoch, BLOCK)[partition])
    shard_of_sample = np.repeat(np.arange(len(sizes)), sizes)
    return [set(shard_of_sample[drawn[node[node >= 0]]].tolist()) for node in partition]


@pytest.mark.filterwarnings("ignore:Shuffle block size")
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("num_nodes", "parts"), [(1, 1), (2, 1), (2, 2), (2, 8), (4, 4), (4, 2), (4, 8), (8, 16)])
@pytest.mark.parametrize(("smallest", "largest"), [(9, 9), (5, 30)])
def test_a_node_is_given_the_shards_that_it_reads_in_any_epoch(
    num_nodes: int, parts: int, smallest: int, largest: int, shuffle: bool
) -> None:
    sizes = shard_sizes(211, smallest, largest)
    num_drawn = int(sizes.sum()) // 32 * 32
    num_left_out = int(sizes.sum()) - num_drawn
    read: list[set[int]] = [set() for _ in range(num_nodes)]
    for epoch in range(12):
        now_read = shards_read(sizes, num_drawn, epoch, num_nodes, parts, shuffle)
        read = [before | now for before, now in zip(read, now_read, strict=True)]
    for node in range(num_nodes):
        foreseen = set(
            shards_of_node(sizes, num_drawn, Share(node, num_nodes, parts, SEED if shuffle else None)).tolist()
        )
        assert read[node] <= foreseen
        # More only at the ends of each part, which the samples that an epoch leaves out may move.
        parts_of_node = max(1, parts // num_nodes)
        assert len(foreseen - read[node]) <= 2 * parts_of_node * (2 + num_left_out // smallest)


def test_nodes_that_share_evenly_fetch_an_equal_share() -> None:
    """ImageNet in 1,100 shards on 8 nodes: an eighth each and a few at the ends, not all."""
    sizes = np.full(1100, 1165)
    num_drawn = int(sizes.sum()) // 256 * 256
    counts = [len(shards_of_node(sizes, num_drawn, Share(node, 8, 8, SEED))) for node in range(8)]
    assert max(counts) <= 1100 / 8 + 2
    assert sum(counts) >= 1100
    assert len(shards_of_node(sizes, num_drawn, Share(0, 8, 1, SEED))) == 1100  # all nodes read the same part
    assert len(shards_of_node(sizes, num_drawn, Share(2, 3, 8, SEED))) == 1100  # neither divides the other


def test_a_node_is_given_all_shards_if_an_epoch_may_leave_one_out() -> None:
    sizes = np.array([*[50] * 20, 1])
    assert len(shards_of_node(sizes, 992, Share(0, 2, 2, SEED))) == 21
