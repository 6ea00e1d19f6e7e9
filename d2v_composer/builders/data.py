"""Build the loader of training images, and tell what it needs of each node."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from streaming.base.util import bytes_to_int
from torch.utils.data import DataLoader

from d2v_composer.config.schema import TrainConfig
from d2v_composer.data.augmentation import RandomResizedCropFlip
from d2v_composer.data.mds_index import RoomNeeded, check_image_column, check_room, fetch_index, read_index, room_needed
from d2v_composer.data.sample_order import Share, shards_of_node
from d2v_composer.data.shared_memory import check_shared_memory, shared_memory_needed
from d2v_composer.data.streaming_images import StreamingImages
from d2v_composer.data.verified_stream import ShardError
from d2v_composer.system.errors import InputError
from d2v_composer.system.multi_node import COLLECTIVE_SECONDS, gather_objects, node_leaders_first, raise_on_all_ranks
from d2v_composer.system.retry import reason
from d2v_composer.system.worker_lifetime import FORK

__all__ = [
    "HANGING_SECONDS",
    "LATE_SECONDS",
    "build_collective_timeout",
    "build_room_needs",
    "build_train_loader",
    "epoch_size",
    "room_of_node",
    "shared_memory_of_node",
]

# How much longer than two give up a shard, one after the other, a worker may bring nothing.
HANGING_SECONDS = 300

# How much longer a collective waits than a rank may wait for its images.
LATE_SECONDS = 60


def build_collective_timeout(config: TrainConfig) -> float:
    """Composer's time-out of a collective, or longer where a rank may wait longer for a store to bring its images."""
    loader = config.train_loader
    return COLLECTIVE_SECONDS if loader.remote is None else max(COLLECTIVE_SECONDS, loader.timeout + LATE_SECONDS)


def build_train_loader(config: TrainConfig, image_size: int) -> DataLoader:
    """The section ``train_loader``: augmented uint8 images of this rank.

    An epoch is the largest whole number of global batches, the few samples left over being others in each epoch, so
    that it has the same batches on any number of ranks.

    Raises:
        InputError: The data cannot be used, or is smaller than a batch.
    """
    loader, global_batch_size, world_size = config.train_loader, config.global_train_batch_size, dist.get_world_size()
    local = Path(loader.local)
    with node_leaders_first("the data set's index"):
        if loader.remote is not None and dist.get_local_rank() == 0:  # the other ranks share its folder
            fetch_index(loader.remote, local)
    is_remote = loader.remote is not None
    shards = read_index(local, columns=(loader.column,), option="train_loader.column", shards_may_be_missing=is_remote)
    check_image_column(shards, loader.column, str(local))
    num_samples = sum(shard["samples"] for shard in shards)
    if num_samples < global_batch_size:
        raise InputError(
            f"{local}: has {num_samples} samples, fewer than one batch of global_train_batch_size {global_batch_size}"
        )
    if is_remote:
        check_room(build_room_needs(config, shards))
    raise_on_all_ranks(check_shared_memory(shared_memory_of_node(config, len(shards), num_samples, image_size)))
    try:
        dataset = StreamingImages(
            local=local,
            remote=loader.remote,
            batch_size=global_batch_size // world_size,
            transform=RandomResizedCropFlip(
                image_size,
                (loader.crop_scale[0], loader.crop_scale[1]),
                (loader.crop_ratio[0], loader.crop_ratio[1]),
                loader.flip,
            ),
            column=loader.column,
            seed=config.seed,
            shuffle=loader.shuffle,
            shuffle_block_size=loader.shuffle_block_size,
            num_canonical_nodes=loader.num_canonical_nodes,
            epoch_size=epoch_size(config, num_samples),
            cache_limit=loader.cache_limit,
            timeout=loader.timeout,
        )
    except (ShardError, ValueError) as error:  # cache_limit, which only the shards show to be too small
        raise InputError(f"train_loader: {reason(error)}") from error
    has_workers = loader.num_workers > 0
    return DataLoader(
        dataset,
        batch_size=dataset.batch_size,
        num_workers=loader.num_workers,
        prefetch_factor=loader.prefetch_factor if has_workers else None,
        persistent_workers=has_workers,
        multiprocessing_context=FORK if has_workers else None,
        # After the worker's own error, which names the shard; this one is for a worker that hangs.
        timeout=2 * loader.timeout + HANGING_SECONDS if has_workers else 0,
        pin_memory=torch.cuda.is_available(),
    )


def epoch_size(config: TrainConfig, num_samples: int) -> int:
    """The samples of the largest whole number of global batches."""
    return num_samples // config.global_train_batch_size * config.global_train_batch_size


def room_of_node(config: TrainConfig, shards: list[dict[str, Any]], node: int, num_nodes: int) -> RoomNeeded:
    """The room that a node, this one, still needs for the shards that it will read."""
    loader = config.train_loader
    shard_sizes = np.array([shard["samples"] for shard in shards])
    share = Share(node, num_nodes, loader.num_canonical_nodes, config.seed if loader.shuffle else None)
    read = shards_of_node(shard_sizes, epoch_size(config, int(shard_sizes.sum())), share)
    return room_needed(shards, Path(loader.local), bytes_to_int(loader.cache_limit or 0), read)


def build_room_needs(config: TrainConfig, shards: list[dict[str, Any]]) -> list[RoomNeeded]:
    """The room that each node still needs; the same list on every rank."""
    num_nodes = dist.get_world_size() // dist.get_local_world_size()
    need = room_of_node(config, shards, dist.get_node_rank(), num_nodes)
    needs = gather_objects((dist.get_local_rank(), need))
    return [need for local_rank, need in needs if local_rank == 0]


def shared_memory_of_node(config: TrainConfig, num_shards: int, num_samples: int, image_size: int) -> int:
    """The bytes of shared memory that the ranks of a node need for their data."""
    loader, ranks = config.train_loader, dist.get_local_world_size()
    batch_bytes = config.global_train_batch_size // dist.get_world_size() * 3 * image_size**2
    return shared_memory_needed(num_shards, num_samples, ranks, loader.num_workers, loader.prefetch_factor, batch_bytes)
