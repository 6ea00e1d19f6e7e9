"""Build the loader of training samples, and check the disk space and shared memory that it needs on a node."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from d2v_composer.config.schema import ShardLoaderConfig, TrainLoaderConfig
from d2v_composer.data.index import check_room, describe_data, fetch_index, read_index, read_lengths
from d2v_composer.data.labeled import collate_labeled, worker_options
from d2v_composer.data.modality import Modality, Transform
from d2v_composer.data.streaming import (
    LabelColumn,
    StreamingSamples,
    check_shared_memory,
    collate_clips,
    padded_sizes,
    shared_memory_needed,
)
from d2v_composer.system.errors import InputError, errors_of
from d2v_composer.system.processes import num_nodes
from d2v_composer.system.ranks import node_leaders_first, raise_on_all_ranks

# Grace beyond two shard timeouts before a silent worker counts as hung.
HANGING_SECONDS = 300
# Time for a store to answer at the start, if the data set's index is not in the cache.
INDEX_SECONDS = 60.0
# Fields of the section that are StreamingSamples' arguments.
PASSED_ON = {"shuffle", "shuffle_block_size", "num_canonical_nodes", "cache_limit", "timeout"}


TrainData = tuple[list[dict[str, Any]], NDArray[np.int64] | None]
"""The index's shards, and the length of each sample, (N,); ``None`` if all have one size."""


def read_train_index(
    loader: TrainLoaderConfig, modality: Modality, batch_size: int, label_column: str | None = None
) -> TrainData:
    """Return the shards in the training samples' index, and the lengths; fetch those of a remote data set first.

    Raises:
        InputError: The data cannot be used, is smaller than a batch, or differs between nodes.
    """
    local = Path(loader.local)
    with node_leaders_first("the data set's index"):
        if loader.remote is not None and dist.get_local_rank() == 0:  # the other ranks share its folder
            fetch_index(loader.remote, local, min(loader.timeout, INDEX_SECONDS))
    with errors_of("train_loader.local" if label_column is None else "dataset.root", InputError):
        shards, lengths = read_train_data(loader, local, modality, label_column)
    # With other data on a node, some samples would be read twice, others never.
    found = dist.all_gather_object((dist.get_node_rank(), describe_data(shards, lengths)["sha256"]))
    if others := sorted({node for node, digest in found if digest != found[0][1]}):
        raise InputError(f"{local}: the data set on node {others[0]} differs from the one on node 0")
    if (num_samples := count_samples(shards)) < batch_size:
        raise InputError(
            f"{local}: has {num_samples} samples, fewer than one batch of global_train_batch_size {batch_size}"
        )
    return shards, lengths


def read_train_data(
    loader: TrainLoaderConfig, folder: Path, modality: Modality, label_column: str | None = None
) -> TrainData:
    """Read the index of the training samples, and the lengths, in a folder."""
    shards = read_index(
        folder,
        loader.column or modality.name,
        modality,
        option="train_loader.column" if label_column is None else "dataset.column and dataset.label_column",
        source=loader.remote,
        other_columns=() if label_column is None else (label_column,),
        shards_may_be_missing=loader.remote is not None,
    )
    return shards, read_lengths(folder, count_samples(shards), loader.remote) if modality.has_lengths else None


def count_samples(shards: list[dict[str, Any]]) -> int:
    return sum(shard["samples"] for shard in shards)


def build_train_loader(
    loader: TrainLoaderConfig,
    modality: Modality,
    data: TrainData,
    transform: Transform,
    batch_size: int,
    seed: int,
    labels: LabelColumn | None = None,
    is_compiled: bool = False,
) -> DataLoader:
    """Build this rank's loader from ``train_loader``: augmented samples, with labels if ``labels`` is set.

    Clips are padded to the longest in a batch of a rank, and for a compiled model to one of few sizes.

    An epoch is the largest whole number of global batches, so that it has the same batches on any number of ranks. The
    few samples left over differ from epoch to epoch.

    Raises:
        InputError: The node has too little disk space or shared memory, or the cache limit is too small.
    """
    local, (shards, lengths) = Path(loader.local), data
    if loader.remote is not None:
        raise_on_all_ranks(check_room(shards, local, loader.cache_limit, 1 / num_nodes()))
    check_memory(loader, batch_size, transform.sample_bytes)
    options = loader.model_dump(include=PASSED_ON)
    collate = None
    if lengths is not None and transform.longest is not None:
        options["lengths"] = np.minimum(lengths, transform.longest)
        sizes = padded_sizes(options["lengths"]) if is_compiled else []
        collate = partial(collate_clips, name=modality.name, sizes=sizes) if labels is None else collate_labeled
    with errors_of("train_loader", InputError):
        dataset = StreamingSamples(
            local=local,
            remote=loader.remote,
            batch_size=batch_size // dist.get_world_size(),
            transform=transform,
            name=modality.name,
            column=loader.column or modality.name,
            seed=seed,
            epoch_size=count_samples(shards) // batch_size * batch_size,
            labels=labels,
            **options,
        )
    return DataLoader(
        dataset,
        batch_size=dataset.order.batch_size,
        sampler=dataset.order,
        collate_fn=collate,
        **worker_options(
            *(loader.num_workers, loader.prefetch_factor, torch.cuda.is_available()),
            # For a worker that hangs. It ends after the worker's own error would have named the shard.
            timeout=2 * loader.timeout + HANGING_SECONDS,
        ),
    )


def check_memory(loader: ShardLoaderConfig, batch_size: int, sample_bytes: int) -> None:
    """Check that the node has the shared memory for its ranks' batches.

    Raises:
        InputError: It is too small on some node.
    """
    batch_bytes = batch_size // dist.get_world_size() * sample_bytes
    needed = shared_memory_needed(dist.get_local_world_size(), loader.num_workers, loader.prefetch_factor, batch_bytes)
    raise_on_all_ranks(check_shared_memory(needed))
