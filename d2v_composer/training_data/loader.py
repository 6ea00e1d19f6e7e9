"""Build the loader of the training samples."""

import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from composer.utils import dist
from torch.utils.data import DataLoader

from d2v_composer.config.schema import LoaderConfig, TrainerConfig, TrainLoaderConfig
from d2v_composer.data import build_augmentation
from d2v_composer.data.modality import Modality
from d2v_composer.sources.labeled import collate_labeled
from d2v_composer.sources.mds import Index
from d2v_composer.sources.shards import fetch_index
from d2v_composer.sources.source import worker_options
from d2v_composer.system.errors import InputError, errors_of
from d2v_composer.system.files import check_room
from d2v_composer.system.ranks import node_leaders_first, raise_on_all_ranks
from d2v_composer.training_data.sampler import StreamingSamples, collate_clips, padded_sizes

# Grace beyond two shard timeouts before a silent worker counts as hung.
HANGING_SECONDS = 300
# Time for a store to answer at the start, if the data set's index is not in the cache.
START_SECONDS = 60.0
# Fields of the section that are StreamingSamples' arguments.
PASSED_ON = {"shuffle", "shuffle_block_size", "num_canonical_nodes", "cache_limit", "timeout"}
# Shared memory, on Linux. The queues and events of one worker are semaphores, of a page each.
SHARED_MEMORY, SEMAPHORES, PAGE = Path("/dev/shm"), 16, 4096


def read_train_index(
    loader: TrainLoaderConfig, modality: Modality, batch_size: int, label_column: str | None = None
) -> Index:
    """Read the index of the training samples from a folder or a store.

    Raises:
        InputError: The data set cannot be used, has fewer samples than a batch, or differs between nodes.
    """
    local = Path(loader.local)
    with node_leaders_first("the data set's index"):
        if loader.remote is not None and dist.get_local_rank() == 0:  # the other ranks share its folder
            fetch_index(loader.remote, local, min(loader.timeout, START_SECONDS))
        with errors_of("train_loader.local" if label_column is None else "dataset.root", InputError):
            index = Index(local, modality, loader.column, labels=label_column, remote=loader.remote)
            digest = index.sha256 if dist.get_local_rank() == 0 else ""  # one rank of a node reads the shards
    # With other data on a node, some samples would be read twice, others never.
    digests = dist.all_gather_object((dist.get_node_rank(), digest))
    if nodes := sorted({node for node, digest in digests if digest not in ("", digests[0][1])}):
        raise InputError(
            f"{local}: the data set on node {nodes[0]} differs from the one on node 0; all nodes need the same data"
        )
    index.sha256 = digests[0][1]
    if len(index) < batch_size:
        raise InputError(
            f"{local} has {len(index)} samples, fewer than one batch of global_train_batch_size {batch_size}; "
            "lower global_train_batch_size"
        )
    return index


def build_train_loader(
    config: TrainerConfig,
    loader: TrainLoaderConfig,
    index: Index,
    *,
    num_classes: int = 1,
    is_compiled: bool = False,
) -> DataLoader:
    """Build this rank's loader of augmented training samples, with labels if the index has labels.

    An epoch has only whole global batches.

    Args:
        config: Config of the run.
        loader: The section ``train_loader``.
        index: The samples.
        num_classes: Number of classes, if the index has labels.
        is_compiled: True if the model is compiled; the batches of clips then have at most 16 different lengths.

    Raises:
        InputError: An option of another modality is set, the node has too little disk space or shared memory, or the
            cache limit is too small.
    """
    batch_size, seed = config.global_train_batch_size, config.seed
    transform = build_augmentation(loader, index.modality, seed).transform
    if loader.remote is not None:
        sizes = {index.folder / shard.raw.basename: shard.raw.bytes for shard in index.shards}
        stored = sum(size for path, size in sizes.items() if path.is_file())
        advice = "set train_loader.cache_limit"
        room = check_room(index.folder, "the shards", sum(sizes.values()), stored, advice, loader.cache_limit)
        raise_on_all_ranks(room)
    check_memory(loader, batch_size, transform.sample_bytes)
    options, collate = loader.model_dump(include=PASSED_ON), None
    if index.lengths is not None and transform.longest is not None:
        options["lengths"] = np.minimum(index.lengths, transform.longest)
        sizes = padded_sizes(options["lengths"]) if is_compiled else []
        name = index.modality.name
        collate = partial(collate_clips, name=name, sizes=sizes) if index.labels is None else collate_labeled
    with errors_of("train_loader", InputError):
        dataset = StreamingSamples(
            index,
            transform,
            seed=seed,
            num_classes=num_classes,
            global_batch_size=batch_size,
            epoch_size=len(index) // batch_size * batch_size,
            **options,
        )
    return DataLoader(
        dataset,
        batch_size=batch_size // dist.get_world_size(),
        sampler=dataset.order,
        collate_fn=collate,
        **worker_options(
            loader.num_workers,
            loader.prefetch_factor,
            torch.cuda.is_available(),
            # For a worker that hangs. It ends after the worker's own error would have named the shard.
            timeout=2 * loader.timeout + HANGING_SECONDS,
        ),
    )


def check_memory(loader: LoaderConfig, batch_size: int, sample_bytes: int) -> None:
    """Check that the node has enough shared memory for the batches of its ranks."""
    # SIGBUS would silently kill a process that writes more than is free.
    batch_bytes, workers = batch_size // dist.get_world_size() * sample_bytes, loader.num_workers
    # Beside those made in advance, each rank has one in the making and one in use.
    batches = (workers * loader.prefetch_factor + 2) * (batch_bytes + PAGE) if workers else 0
    needed = dist.get_local_world_size() * (batches + workers * SEMAPHORES * PAGE)
    problem = None
    if SHARED_MEMORY.is_dir() and (usage := shutil.disk_usage(SHARED_MEMORY)).free < needed:
        size = f"{math.ceil((usage.used + needed) / 2**20)}m"
        problem = (
            f"{SHARED_MEMORY}: {usage.free:,} of {usage.total:,} bytes are free, but the batches need {needed:,}; "
            f"enlarge it (docker run --shm-size={size}, or mount -o remount,size={size} {SHARED_MEMORY}), or lower "
            "train_loader.num_workers or prefetch_factor"
        )
    raise_on_all_ranks(problem)
