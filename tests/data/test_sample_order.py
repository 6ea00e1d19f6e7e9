"""An epoch's samples and a node's shards, beside what Streaming itself draws, shuffles and partitions."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.partition import get_partitions
from streaming.base.shuffle import get_shuffle

from d2v_composer.data.augmentation import RandomResizedCropFlip
from d2v_composer.data.sample_order import Share, draw_samples, shards_of_node
from d2v_composer.data.streaming_images import StreamingImages
from d2v_composer.data.verified_dataset import UNSUPPORTED, VerifiedDataset
from d2v_composer.system.errors import InputError
from helpers import NUM_IMAGES

SEED = 17
BLOCK = 64


def shard_sizes(num_shards: int, smallest: int, largest: int) -> NDArray[np.int64]:
    return np.random.default_rng((num_shards, smallest, largest)).integers(smallest, largest + 1, num_shards)


def streamings_draw(
    sizes: NDArray[np.int64], num_drawn: int, epoch: int, changes: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What Streaming 0.13 draws of one stream."""
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
def test_an_epochs_samples_are_streamings(
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
def test_the_data_set_draws_so(many_shards_order: StreamingImages, shuffle: bool) -> None:
    dataset = many_shards_order
    dataset.epoch_seed_change = shuffle
    for epoch in range(3):
        for mine, theirs in zip(
            dataset.resample_streams(epoch), StreamingDataset.resample_streams(dataset, epoch), strict=True
        ):
            assert np.array_equal(mine, theirs)


@pytest.fixture
def many_shards_order(many_shards: Path) -> StreamingImages:
    return StreamingImages(
        local=many_shards, batch_size=10, transform=RandomResizedCropFlip(24), seed=SEED, epoch_size=90
    )


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
def test_a_nodes_shards_are_those_that_it_meets_in_any_epoch(
    num_nodes: int, parts: int, smallest: int, largest: int, shuffle: bool
) -> None:
    sizes = shard_sizes(211, smallest, largest)
    num_drawn = int(sizes.sum()) // 32 * 32
    num_left_out = int(sizes.sum()) - num_drawn
    met: list[set[int]] = [set() for _ in range(num_nodes)]
    for epoch in range(12):
        read = shards_read(sizes, num_drawn, epoch, num_nodes, parts, shuffle)
        met = [before | now for before, now in zip(met, read, strict=True)]
    for node in range(num_nodes):
        foreseen = set(
            shards_of_node(sizes, num_drawn, Share(node, num_nodes, parts, SEED if shuffle else None)).tolist()
        )
        assert met[node] <= foreseen
        # Beyond what it met: at each part's ends, as many as the samples that an epoch leaves out may move it.
        parts_of_node = max(1, parts // num_nodes)
        assert len(foreseen - met[node]) <= 2 * parts_of_node * (2 + num_left_out // smallest)


def test_nodes_that_share_evenly_fetch_their_share() -> None:
    """ImageNet in 1,100 shards on 8 nodes: an eighth each and a few at the ends, not all."""
    sizes = np.full(1100, 1165)
    num_drawn = int(sizes.sum()) // 256 * 256
    counts = [len(shards_of_node(sizes, num_drawn, Share(node, 8, 8, SEED))) for node in range(8)]
    assert max(counts) <= 1100 / 8 + 2
    assert sum(counts) >= 1100
    assert len(shards_of_node(sizes, num_drawn, Share(0, 8, 1, SEED))) == 1100  # one part, for all nodes
    assert len(shards_of_node(sizes, num_drawn, Share(2, 3, 8, SEED))) == 1100  # neither divides the other


def test_a_shard_that_an_epoch_may_leave_out_moves_all_others() -> None:
    sizes = np.array([*[50] * 20, 1])
    assert len(shards_of_node(sizes, 992, Share(0, 2, 2, SEED))) == 21


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(many_shards: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: is not supported: "):
        VerifiedDataset(
            local=many_shards,
            remote=None,
            timeout=1,
            cache_limit=None,
            shuffle_block_size=1,
            batch_size=1,
            **{name: "anything"},
        )


def test_an_epoch_of_more_samples_than_there_are_is_refused(many_shards: Path) -> None:
    with pytest.raises(ValueError, match=f"epoch_size must be at most the {NUM_IMAGES} samples, got 97"):
        StreamingImages(local=many_shards, batch_size=1, transform=RandomResizedCropFlip(24), seed=5, epoch_size=97)
