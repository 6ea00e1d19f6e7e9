"""Build a whole fine-tuning run from its config, for recipes/finetune.py."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from composer.core import DataSpec, Evaluator
from torch import Tensor
from torch.utils.data import DataLoader

from d2v_composer.builders.data import build_train_loader, check_memory, read_train_index
from d2v_composer.builders.models import build_augmentation, load_trained_model
from d2v_composer.builders.run import build_trainer_arguments
from d2v_composer.builders.training import (
    FIXED_IN_A_FINETUNING,
    build_algorithms,
    build_optimizer,
    build_run_record,
    build_scheduler,
)
from d2v_composer.callbacks.algorithms import SeededBatches
from d2v_composer.checkpoints.load import without_head
from d2v_composer.checkpoints.student_file import PrimaryEmbedding, choose_embedding, sizes_of
from d2v_composer.config.schema import FinetuneConfig, TrainLoaderConfig
from d2v_composer.data.labeled import (
    AugmentedSamples,
    LabeledSamples,
    eval_batches,
    load_labeled_set,
    load_mds,
    read_class_names,
    train_batches,
)
from d2v_composer.data.modalities import modality_of
from d2v_composer.embedding import hash_weights
from d2v_composer.models.classification import Classifier
from d2v_composer.models.execution import choose_precision
from d2v_composer.models.sizes import EncoderConfig
from d2v_composer.models.student import Student
from d2v_composer.models.teacher import Teacher
from d2v_composer.system.errors import InputError
from d2v_composer.system.ranks import node_leaders_first


class FinetuneImages(NamedTuple):
    """Images of a fine-tuning run."""

    train_loader: DataLoader
    """Augmented uint8 images of this rank, with their labels."""
    test: LabeledSamples
    class_names: tuple[str, ...]
    """Name of each label; empty if the labels are only numbers."""
    num_classes: int
    about: Mapping[str, Any]
    """Description of the train images for the run's record: ``location``, ``samples``, and ``sha256`` of images and
    labels."""


def build_images(config: FinetuneConfig, sizes: EncoderConfig) -> FinetuneImages:
    """Build an encoder's images from the sections ``dataset`` and ``train_loader``.

    Raises:
        InputError: The data set cannot be used or is smaller than a batch, or the node has too little disk space or
            shared memory.
    """
    return (_streamed if config.train_loader.stream else _in_memory)(config, sizes)


def _streamed(config: FinetuneConfig, sizes: EncoderConfig) -> FinetuneImages:
    dataset, root, modality = config.dataset, Path(config.dataset.root), modality_of(sizes)
    options = config.train_loader.model_dump(exclude={"stream"})
    loader = TrainLoaderConfig(**options, local=str(root / "train"), column=dataset.column)
    index = read_train_index(loader, modality, config.global_train_batch_size, dataset.label_column)
    with node_leaders_first("the test images and the classes"):
        test = load_mds(root / "test", modality, dataset.column, dataset.label_column)
        class_names = read_class_names(root)
    num_classes = count_classes(root, class_names, test.labels)
    transform = build_augmentation(loader, sizes, config.seed).transform
    sizes_and_seed = config.global_train_batch_size, config.seed
    train_loader = build_train_loader(loader, index, transform, *sizes_and_seed, num_classes=num_classes)
    about = {"location": loader.remote or loader.local, **index.describe()}
    return FinetuneImages(train_loader, test, class_names, num_classes, about)


def _in_memory(config: FinetuneConfig, sizes: EncoderConfig) -> FinetuneImages:
    with node_leaders_first("the data set"):
        labeled = load_labeled_set(modality=modality_of(sizes), **config.dataset.model_dump())
    if not labeled.has_labels:
        raise InputError(f"dataset: {config.dataset.root} has no labels; fine-tuning needs them")
    train, test, class_names = labeled
    loader, batch_size, num_images = config.train_loader, config.global_train_batch_size, len(train.labels)
    if num_images < batch_size:
        expected = f"at most {num_images}, the number of train images"
        raise InputError(f"global_train_batch_size: must be {expected}; got {batch_size}")
    about = {"location": config.dataset.root, "samples": num_images, "sha256": hash_samples(train)}
    num_classes = count_classes(Path(config.dataset.root), class_names, train.labels, test.labels)
    augment = build_augmentation(loader, sizes, config.seed)
    check_memory(loader, batch_size, augment.transform.sample_bytes)
    augmented = AugmentedSamples(train, augment)
    batches = train_batches(augmented, batch_size, loader.num_workers, loader.prefetch_factor)
    return FinetuneImages(batches, test, class_names, num_classes, about)


def hash_samples(labeled: LabeledSamples) -> str:
    """Return the sha256 of samples and their labels."""
    digest = hashlib.sha256()
    for each in (*labeled.samples, labeled.labels):
        digest.update(each.contiguous().numpy().data)
    return digest.hexdigest()


def count_classes(root: Path, class_names: tuple[str, ...], *splits: Tensor) -> int:
    """Return the number of classes, given their names and each split's labels, (N,).

    Raises:
        InputError: There are fewer than two, or a label is negative or far beyond the others.
    """
    labels = torch.cat(splits).unique()
    smallest, largest, num_known = int(labels.min()), int(labels.max()), max(len(class_names), len(labels))
    if smallest < 0 or num_known < 2 or largest >= 100 * num_known:  # the classifier has an output for each number
        found = f"{num_known} with labels from {smallest} to {largest}"
        raise InputError(f"dataset.root: {root}: expected at least two classes, numbered from 0; got {found}")
    return max(len(class_names), largest + 1)


EVALUATOR = "test"
"""Name of the evaluation in metric keys, such as metrics/test/top1."""


class BuiltFinetuning(NamedTuple):
    """A fine-tuning run that is ready to train."""

    trainer_arguments: dict[str, Any]
    """Arguments of Composer's Trainer."""
    model: Classifier
    header: dict[str, str]
    """Lines at the top of the run's log."""


def build_finetuning(config: FinetuneConfig) -> BuiltFinetuning:
    """Build everything that a fine-tuning run needs, and lock its folder.

    Call it on every rank, after they have joined.

    Raises:
        InputError: A file, data set or setting cannot be used.
    """
    with node_leaders_first("the model"):
        backbone, _ = load_trained_model(config)
    if isinstance(backbone, Student):
        backbone = without_head(backbone)  # of an earlier fine-tuning run
    embedding = choose_embedding(backbone, config.pooling, config.representation)
    modality = modality_of(backbone.encoder.config)
    for name in ("mixup", "cutmix") if modality.has_lengths else ():
        if getattr(config.algorithms, name) is not None:
            raise InputError(f"algorithms.{name}: must be null, because the model takes {modality.unit}")
    images = build_images(config, backbone.encoder.config)
    about = describe_model(config, backbone, embedding, images)
    cpu_bf16 = choose_precision(config.precision).cpu_bf16
    model = Classifier(backbone, images.num_classes, *embedding, config.train_encoder, cpu_bf16)
    tested = eval_batches(images.test, config.device_eval_batch_size)
    data = {"modality": modality.name, **images.about, "test_sha256": hash_samples(images.test)}
    record = build_run_record(config, FIXED_IN_A_FINETUNING, model=about, data=data)
    arguments = {
        "train_dataloader": DataSpec(images.train_loader, microbatch_transforms=model.prepare),
        "eval_dataloader": Evaluator(label=EVALUATOR, dataloader=DataSpec(tested, microbatch_transforms=model.prepare)),
        "eval_interval": config.eval_interval,
        "optimizers": build_optimizer(config.optimizer, model, model.depth_of_trained, config.optimizer.layer_decay),
        "schedulers": build_scheduler(config, len(images.train_loader)),
        "algorithms": build_algorithms(config.algorithms),
        **build_trainer_arguments(config, model, record, [SeededBatches(config.seed)]),
    }
    header = {
        modality.unit: f"{images.about['samples']:,} for training, {len(images.test.labels):,} for testing, "
        f"{images.num_classes} classes",
        "start": config.model,
    }
    return BuiltFinetuning(arguments, model, header)


def describe_model(
    config: FinetuneConfig, backbone: Student | Teacher, embedding: PrimaryEmbedding, images: FinetuneImages
) -> dict[str, Any]:
    """Describe the fine-tuned model for the run's record; for a student, include all that its export needs."""
    about = {
        "kind": "student" if isinstance(backbone, Student) else "teacher",
        "path": config.model,
        "sha256": hash_weights(backbone),
        **embedding._asdict(),
        "num_classes": images.num_classes,
        "class_names": list(images.class_names),
        "provenance": backbone.provenance,
    }
    if isinstance(backbone, Student):
        about["sizes"] = sizes_of(backbone)
        if config.train_encoder and "outputs" in about["sizes"]["encoder"]:
            about["sizes"]["encoder"]["outputs"] = []  # those of the encoder before
    return about
