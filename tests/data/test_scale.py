"""The order of an epoch on 512 ranks, computed in one process: each worker's share, and a resume on 384 ranks."""

import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from streaming.base.batching import generate_work
from streaming.base.world import World

from d2v_composer.data.streaming import StreamingImages
from streams import open_images

RANKS_PER_NODE = 8
WORKERS_PER_RANK = 8
NODES, FEWER_NODES = 64, 48
# 6 samples a rank on 512 ranks, 8 on 384.
GLOBAL_BATCH = 3072
EPOCH = 3


def write_index(folder: Path, num_shards: int, num_samples: int) -> None:
    """Write the index of shards that differ by a sample; there are no files."""
    borders = np.arange(num_shards + 1) * num_samples // num_shards
    columns = {"column_encodings": ["bytes"], "column_names": ["image"], "column_sizes": [None]}
    shards = [
        {
            **columns,
            "compression": None,
            "format": "mds",
            "hashes": [],
            "raw_data": {"basename": f"shard.{i:06}.mds", "bytes": 1 << 17, "hashes": {}},
            "samples": int(samples),
            "size_limit": 1 << 17,
            "version": 2,
            "zip_data": None,
        }
        for i, samples in enumerate(np.diff(borders))
    ]
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}))


def open_epoch(folder: Path, num_samples: int) -> StreamingImages:
    batch_size = GLOBAL_BATCH // (NODES * RANKS_PER_NODE)
    epoch_size = num_samples // GLOBAL_BATCH * GLOBAL_BATCH
    return open_images(folder, batch_size=batch_size, num_canonical_nodes=NODES, epoch_size=epoch_size)


def work_of(dataset: StreamingImages, num_nodes: int) -> NDArray[np.int64]:
    """The samples, or -1, by (node, rank of the node, worker of the rank, batch of the worker, place in the batch)."""
    world = World(num_nodes, RANKS_PER_NODE, WORKERS_PER_RANK, 0)
    dataset.batch_size = GLOBAL_BATCH // world.num_ranks
    epoch, sample_in_epoch = dataset._resume(world, EPOCH)
    return generate_work(dataset.batching_method, dataset, world, epoch, sample_in_epoch)


def global_batches(work: NDArray[np.int64]) -> NDArray[np.int64]:
    """The samples of each global batch, (batches, samples): a loader takes batches from its workers in turn."""
    batches = work.transpose(3, 2, 0, 1, 4).reshape(-1, GLOBAL_BATCH)
    is_padding = (batches == -1).all(axis=1)
    assert (np.diff(is_padding.astype(int)) >= 0).all()  # padding is at the end
    return batches[~is_padding]


@pytest.mark.parametrize(
    ("num_shards", "num_samples"), [(2_000, 25_600), pytest.param(100_000, 1_281_167, marks=pytest.mark.slow)]
)
def test_reads_each_sample_once_on_512_ranks(tmp_path: Path, num_shards: int, num_samples: int) -> None:
    write_index(tmp_path, num_shards, num_samples)
    start = time.monotonic()
    dataset = open_epoch(tmp_path, num_samples)
    opened = time.monotonic()
    work_of(dataset, NODES)
    ordered = time.monotonic()
    tracemalloc.start()  # slows the order down
    work = work_of(dataset, NODES)
    megabytes = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    print(
        f"\n{num_shards:,} shards, {num_samples:,} samples: opened in {opened - start:.1f} s; "
        f"an epoch's order for 512 ranks in {ordered - opened:.1f} s, {megabytes:.0f} MB"
    )
    assert work.shape[:3] == (NODES, RANKS_PER_NODE, WORKERS_PER_RANK)
    batches = global_batches(work)
    num_batches = num_samples // GLOBAL_BATCH
    assert len(batches) == num_batches
    seen = np.bincount(batches.ravel(), minlength=num_samples)
    assert len(seen) == num_samples
    assert seen.max() == 1
    assert seen.sum() == num_batches * GLOBAL_BATCH

    # Each worker gets its row.
    dataset._unique_worker_world = World(1, 1, 1, 0)
    for node, rank, worker in ((0, 0, 0), (40, 7, 5)):
        number = (node * RANKS_PER_NODE + rank) * WORKERS_PER_RANK + worker
        dataset._parallel_worker_world = World(NODES, RANKS_PER_NODE, WORKERS_PER_RANK, number)
        own = dataset._get_work(EPOCH, 0)
        assert (own == work[node, rank, worker].ravel()).all()

    # 384 ranks resume in the middle of the epoch.
    trained = num_batches // 2
    dataset.load_state_dict(
        {
            "epoch": EPOCH,
            "sample_in_epoch": trained * GLOBAL_BATCH,
            "num_canonical_nodes": NODES,
            "shuffle_seed": dataset.shuffle_seed,
            "initial_physical_nodes": NODES,
        }
    )
    rest = global_batches(work_of(dataset, FEWER_NODES))
    assert np.array_equal(np.sort(rest), np.sort(batches[trained:]))
