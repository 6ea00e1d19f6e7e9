"""Build the loader of training images, and compute the disk space and shared memory that it needs on a node."""

import math
from pathlib import Path
from typing import Any, Protocol

import torch
from composer.utils import dist
from torch import Tensor
from torch.utils.data import DataLoader

from d2v_composer.builders.run_folder import errors_of
from d2v_composer.config.schema import ShardLoaderConfig, TrainLoaderConfig
from d2v_composer.data.images import RandomResizedCropFlip
from d2v_composer.data.index import RoomNeeded, check_room, describe_data, fetch_index, read_image_index, room_needed
from d2v_composer.data.streaming import (
    LabelColumn,
    StreamingImages,
    check_shared_memory,
    shared_memory_needed,
)
from d2v_composer.models.encoder import ImageSize, height_and_width
from d2v_composer.system.errors import InputError, ShardError, reason
from d2v_composer.system.processes import die_with_parent
from d2v_composer.system.ranks import (
    COLLECTIVE_SECONDS,
    gather_objects,
    node_leaders_first,
    num_nodes,
    raise_on_all_ranks,
)

# Grace beyond two shard timeouts before a silent worker counts as hung.
HANGING_SECONDS = 300
# Grace of a collective beyond the longest wait of a rank for its images.
LATE_SECONDS = 60
# Time for a store to answer at the start, if the data set's index is not in the cache.
INDEX_SECONDS = 60.0
# More than any run was seen to need. Each tensor that a worker has ready is an open file.
OPEN_FILES, OPEN_FILES_PER_WORKER = 256, 16
# Fields of the section that are StreamingImages' arguments.
PASSED_ON = {"column", "shuffle", "shuffle_block_size", "num_canonical_nodes", "cache_limit", "timeout"}


class StreamedRun(Protocol):
    """A config whose training images are streamed."""

    @property
    def train_loader(self) -> TrainLoaderConfig: ...
    @property
    def global_train_batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...


def build_collective_timeout(loader: ShardLoaderConfig) -> float:
    """Return Composer's timeout of a collective, or a longer one if a rank may wait longer for a store."""
    return COLLECTIVE_SECONDS if loader.remote is None else max(COLLECTIVE_SECONDS, loader.timeout + LATE_SECONDS)


def count_open_files(loader: ShardLoaderConfig) -> int:
    """Return the number of files that a training process may have open."""
    return OPEN_FILES + OPEN_FILES_PER_WORKER * loader.num_workers


def read_train_index(config: StreamedRun, label_column: str | None = None) -> list[dict[str, Any]]:
    """Return the shards of the training images as their index lists them; of a remote data set, fetch the index first.

    Args:
        config: The run's config.
        label_column: Column of labels, which a fine-tuning run needs too.

    Raises:
        InputError: The data cannot be used, or is smaller than a batch.
    """
    loader, local = config.train_loader, Path(config.train_loader.local)
    with node_leaders_first("the data set's index"):
        if loader.remote is not None and dist.get_local_rank() == 0:  # the other ranks share its folder
            fetch_index(loader.remote, local, min(loader.timeout, INDEX_SECONDS))
    with errors_of("train_loader.local" if label_column is None else "dataset.root", InputError):
        shards = read_image_index(
            local,
            loader.column,
            option="train_loader.column" if label_column is None else "dataset.column and dataset.label_column",
            other_columns=() if label_column is None else (label_column,),
            shards_may_be_missing=loader.remote is not None,
        )
    check_same_data(local, shards)
    num_samples, batch_size = count_samples(shards), config.global_train_batch_size
    if num_samples < batch_size:
        raise InputError(
            f"{local}: has {num_samples} samples, fewer than one batch of global_train_batch_size {batch_size}"
        )
    return shards


def check_same_data(local: Path, shards: list[dict[str, Any]]) -> None:
    """Compare the data set of every node with node 0's.

    Raises:
        InputError: One differs: some samples would be read twice, others never.
    """
    found = gather_objects((dist.get_node_rank(), describe_data(shards)["sha256"]))
    if others := sorted({node for node, digest in found if digest != found[0][1]}):
        raise InputError(f"{local}: another data set on node {others[0]} than on node 0")


def build_train_loader(
    config: StreamedRun,
    shards: list[dict[str, Any]],
    image_size: ImageSize,
    interpolation: str,
    labels: LabelColumn | None = None,
) -> DataLoader:
    """Build the section ``train_loader``: augmented uint8 images of this rank, or with ``labels`` (image, label) pairs.

    An epoch is the largest whole number of global batches, so that it has the same batches on any number of ranks. The
    few samples left over differ from epoch to epoch.

    Raises:
        InputError: The node has too little disk space or shared memory, or the cache limit is too small.
    """
    loader = config.train_loader
    if loader.remote is not None:
        check_room(build_room_needs(config, shards))
    raise_on_all_ranks(check_shared_memory(shared_memory_of_node(config, shards, image_size)))
    try:
        dataset = StreamingImages(
            local=Path(loader.local),
            remote=loader.remote,
            batch_size=config.global_train_batch_size // dist.get_world_size(),
            transform=build_transform(loader, image_size, interpolation),
            seed=config.seed,
            epoch_size=epoch_size(config, shards),
            labels=labels,
            **loader.model_dump(include=PASSED_ON),
        )
    except (ShardError, ValueError) as error:  # a cache_limit that is too small for these shards
        raise InputError(f"train_loader: {reason(error)}") from error
    has_workers = loader.num_workers > 0
    return DataLoader(
        dataset,
        batch_size=dataset.order.batch_size,
        sampler=dataset.order,
        collate_fn=None if labels is None else collate_pairs,
        num_workers=loader.num_workers,
        prefetch_factor=loader.prefetch_factor if has_workers else None,
        persistent_workers=has_workers,
        multiprocessing_context="fork" if has_workers else None,
        worker_init_fn=lambda _: die_with_parent(),
        # For a worker that hangs. It ends after the worker's own error would have named the shard.
        timeout=2 * loader.timeout + HANGING_SECONDS if has_workers else 0,
        pin_memory=torch.cuda.is_available(),
    )


def collate_pairs(samples: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Return a batch's images and labels as the pair that Composer's mixing algorithms need."""
    return torch.stack([sample["image"] for sample in samples]), torch.tensor([sample["label"] for sample in samples])


def build_transform(loader: ShardLoaderConfig, image_size: ImageSize, interpolation: str) -> RandomResizedCropFlip:
    """Build the augmentation of the training images."""
    return RandomResizedCropFlip(image_size, loader.crop_scale, loader.crop_ratio, loader.flip, interpolation)


def count_samples(shards: list[dict[str, Any]]) -> int:
    return sum(shard["samples"] for shard in shards)


def epoch_size(config: StreamedRun, shards: list[dict[str, Any]]) -> int:
    """Return the samples of the largest whole number of global batches."""
    return count_samples(shards) // config.global_train_batch_size * config.global_train_batch_size


def room_of_node(config: StreamedRun, shards: list[dict[str, Any]], num_nodes: int) -> RoomNeeded:
    """Return the disk space that this node still needs for its share of the shards."""
    loader = config.train_loader
    parts = loader.num_canonical_nodes  # of the order, each with its own shards
    share = 1 / num_nodes if parts % num_nodes == 0 else 1 / parts if num_nodes % parts == 0 else 1.0
    return room_needed(shards, Path(loader.local), loader.cache_limit, share)


def build_room_needs(config: StreamedRun, shards: list[dict[str, Any]]) -> list[RoomNeeded]:
    """Return the disk space that each node still needs; the same list on every rank."""
    need = room_of_node(config, shards, num_nodes())
    return [need for local_rank, need in gather_objects((dist.get_local_rank(), need)) if local_rank == 0]


def shared_memory_of_node(config: StreamedRun, shards: list[dict[str, Any]], image_size: ImageSize) -> int:
    """Return the bytes of shared memory that the ranks of a node need for their data."""
    loader, ranks = config.train_loader, dist.get_local_world_size()
    batch_bytes = config.global_train_batch_size // dist.get_world_size() * 3 * math.prod(height_and_width(image_size))
    return shared_memory_needed(ranks, loader.num_workers, loader.prefetch_factor, batch_bytes)
