"""Build the images of a fine-tuning: the train images in memory or streamed from their shards, the test images."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer.utils import dist
from torch.utils.data import DataLoader

from d2v_composer.builders.data import build_train_loader, build_transform, read_train_index
from d2v_composer.config.finetune import FinetuneConfig
from d2v_composer.config.schema import LabelledSetConfig, ShardLoaderConfig, TrainLoaderConfig
from d2v_composer.data.labelled_batches import AugmentedImages, train_batches
from d2v_composer.data.labelled_mds import fetch_class_names, mds_class_names
from d2v_composer.data.labelled_sets import (
    LabelledImages,
    LabelledSet,
    load_labelled_set,
    load_mds,
    with_classes_of_train,
)
from d2v_composer.data.mds_index import describe_data
from d2v_composer.data.shared_memory import check_shared_memory, shared_memory_needed
from d2v_composer.data.streaming_images import LabelColumn
from d2v_composer.models.encoder import EncoderConfig
from d2v_composer.models.sizes import height_and_width
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError
from d2v_composer.system.multi_node import node_leaders_first, raise_on_all_ranks

__all__ = ["FinetuneImages", "build_images"]

# So many numbers may there be for each class; a split may lack some classes.
LARGEST_GAPS = 100


class FinetuneImages(NamedTuple):
    """The images of a fine-tuning."""

    train_loader: DataLoader
    """Augmented uint8 images of this rank, with their labels."""
    test: LabelledImages
    num_train: int
    class_names: tuple[str, ...]
    """The name of each label; empty if the labels are only numbers."""
    num_classes: int
    about: Mapping[str, Any]
    """The train images, for the run's record; ``sha256`` identifies them and their labels."""


class StreamedImages(NamedTuple):
    """The train images as :func:`build_train_loader` wants them."""

    train_loader: TrainLoaderConfig
    global_train_batch_size: int
    seed: int


def build_images(config: FinetuneConfig, sizes: EncoderConfig) -> FinetuneImages:
    """Build the sections ``dataset`` and ``train_loader`` for an encoder.

    Raises:
        InputError: The data set cannot be used, or is smaller than a batch; or the node has too little room or shared
            memory.
    """
    assert config.dataset is not None  # the config's checks
    if config.train_loader.stream:
        return _streamed(config, config.dataset, sizes)
    return _in_memory(config, config.dataset, sizes)


def _streamed(config: FinetuneConfig, dataset: LabelledSetConfig, sizes: EncoderConfig) -> FinetuneImages:
    root = Path(dataset.root)
    options = {each.name: getattr(config.train_loader, each.name) for each in fields(ShardLoaderConfig)}
    loader = TrainLoaderConfig(**options, local=str(root / "train"), column=dataset.column)
    streamed = StreamedImages(loader, config.global_train_batch_size, config.seed)
    shards = read_train_index(streamed, dataset.label_column)
    with node_leaders_first("the test images and the classes"):
        if loader.remote is not None and mds_class_names(root / "test") and dist.get_local_rank() == 0:
            fetch_class_names(loader.remote, root / "train", loader.timeout)
        test = load_mds(root / "test", sizes.image_size, sizes.interpolation, dataset.column, dataset.label_column)
        test, class_names = with_classes_of_train(test, root)
    num_classes = count_classes(root, class_names, test)
    labels = LabelColumn(dataset.label_column, num_classes)
    train_loader = build_train_loader(streamed, shards, sizes.image_size, sizes.interpolation, labels)
    data = describe_data(shards)
    about = {"location": hide_secrets(loader.remote or loader.local), **data}
    return FinetuneImages(train_loader, test, data["samples"], class_names, num_classes, about)


def _in_memory(config: FinetuneConfig, dataset: LabelledSetConfig, sizes: EncoderConfig) -> FinetuneImages:
    labelled = load_images(dataset, config.global_train_batch_size, sizes)
    train, test, class_names = labelled
    digest = hashlib.sha256(train.images.contiguous().numpy().data)
    digest.update(train.labels.numpy().data)
    about = {
        "location": hide_secrets(dataset.root),
        "samples": labelled.num_images[0],
        "sha256": digest.hexdigest(),
    }
    num_classes = count_classes(Path(dataset.root), class_names, train, test)
    return FinetuneImages(_batches(config, train, sizes), test, len(train.labels), class_names, num_classes, about)


def load_images(dataset: LabelledSetConfig, batch_size: int, sizes: EncoderConfig) -> LabelledSet:
    """Load both splits into memory.

    Raises:
        InputError: The data set cannot be used, or is smaller than a batch.
    """
    with node_leaders_first("the data set"):
        labelled = load_labelled_set(**asdict(dataset), image_size=sizes.image_size, interpolation=sizes.interpolation)
    if (num_images := labelled.num_images[0]) < batch_size:
        raise InputError(f"global_train_batch_size: must be at most the {num_images} train images, got {batch_size}")
    return labelled


def count_classes(root: Path, class_names: tuple[str, ...], *splits: LabelledImages) -> int:
    """Return the number of classes, by their names and the largest label.

    Raises:
        InputError: There are less than two, or a label is negative or far beyond the others.
    """
    labels = torch.cat([split.labels for split in splits]).unique()
    largest, num_known = int(labels.max()), max(len(class_names), len(labels))
    if int(labels.min()) < 0:
        raise InputError(f"dataset.root: {root}: its labels must be numbers from 0")
    if num_known < 2:
        raise InputError(f"dataset.root: {root}: has one class, expected at least two")
    if largest >= LARGEST_GAPS * num_known:  # the classifier has an output for each number
        raise InputError(f"dataset.root: {root}: {num_known} classes, but label {largest}: number them from 0")
    return max(len(class_names), largest + 1)


def _batches(config: FinetuneConfig, train: LabelledImages, sizes: EncoderConfig) -> DataLoader:
    """Build the loader of this rank's augmented batches of images in memory."""
    loader, batch_size = config.train_loader, config.global_train_batch_size
    height, width = height_and_width(sizes.image_size)
    ranks, on_each = dist.get_local_world_size(), batch_size // dist.get_world_size()
    needed = shared_memory_needed(0, 0, ranks, loader.num_workers, loader.prefetch_factor, on_each * 3 * height * width)
    raise_on_all_ranks(check_shared_memory(needed))
    transform = build_transform(loader, sizes.image_size, sizes.interpolation)
    dataset = AugmentedImages(train, transform, config.seed)
    return train_batches(dataset, batch_size, loader.num_workers, loader.prefetch_factor)
