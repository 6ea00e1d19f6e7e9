"""Build a whole fine-tuning from its config: the entry of this package for recipes/finetune.py."""

import hashlib
import json
from dataclasses import asdict
from typing import Any, NamedTuple

from composer.core import DataSpec, Evaluator
from composer.utils import dist
from torch.utils.data import DataLoader

from d2v_composer.builders.callbacks import build_finetuning_record
from d2v_composer.builders.data import build_transform
from d2v_composer.builders.loggers import ask_logging_servers
from d2v_composer.builders.optimization import (
    build_classifier_algorithms,
    build_layerwise_optimizer,
    build_scheduler,
)
from d2v_composer.builders.run import build_trainer_arguments
from d2v_composer.callbacks import RunRecord
from d2v_composer.checkpoints.headline import ChosenEmbedding, choose_embedding
from d2v_composer.checkpoints.load import load_any
from d2v_composer.checkpoints.stored_config import sizes_of
from d2v_composer.config.finetune import FinetuneConfig
from d2v_composer.data.labelled_batches import AugmentedImages, eval_batches, train_batches
from d2v_composer.data.labelled_sets import LabelledSet, load_labelled_set
from d2v_composer.data.shared_memory import check_shared_memory, shared_memory_needed
from d2v_composer.embedding.embed import hash_weights
from d2v_composer.models.classification import Classifier, randomize
from d2v_composer.models.precision import choose_precision
from d2v_composer.models.sizes import height_and_width
from d2v_composer.models.student import Student
from d2v_composer.models.teacher import Teacher
from d2v_composer.models.transformer import Transformer
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError
from d2v_composer.system.multi_node import node_leaders_first, raise_on_all_ranks

__all__ = ["EVALUATOR", "BuiltFinetuning", "build_finetuning"]

EVALUATOR = "test"
"""The evaluation's name in metrics: metrics/test/top1."""


class BuiltFinetuning(NamedTuple):
    """A fine-tuning that is ready to train."""

    trainer_arguments: dict[str, Any]
    """Arguments of Composer's Trainer."""
    model: Classifier
    record: RunRecord
    labelled: LabelledSet


def build_finetuning(config: FinetuneConfig) -> BuiltFinetuning:
    """Build everything that a fine-tuning needs, and lock its folder.

    Call it on every rank, after they have joined.

    Raises:
        InputError: A file, data set or setting cannot be used.
    """
    ask_logging_servers(config)
    backbone = load_backbone(config)
    embedding = choose_embedding(backbone, backbone.provenance, config.pooling, config.representation)
    labelled = load_images(config, backbone)
    about = describe_model(config, backbone, embedding, labelled.class_names)
    if config.from_scratch:
        randomize(backbone)
    cpu_bf16 = choose_precision(config.precision).cpu_bf16
    num_classes = count_classes(labelled)
    model = Classifier(backbone, num_classes, *embedding.headline, config.train_encoder, cpu_bf16)
    train_loader = build_train_batches(config, labelled, backbone)
    eval_loader = eval_batches(labelled.test, config.device_eval_batch_size)
    record = build_finetuning_record(config, about, describe_images(config, labelled))
    arguments = {
        "model": model,
        "train_dataloader": DataSpec(train_loader, microbatch_transforms=model.prepare),
        "eval_dataloader": Evaluator(
            label=EVALUATOR, dataloader=DataSpec(eval_loader, microbatch_transforms=model.prepare)
        ),
        "eval_interval": config.eval_interval,
        "optimizers": build_layerwise_optimizer(config.optimizer, model),
        "schedulers": build_scheduler(config, len(train_loader)),
        "algorithms": build_classifier_algorithms(config.algorithms),
        **build_trainer_arguments(config, record, []),
    }
    return BuiltFinetuning(arguments, model, record, labelled)


def load_backbone(config: FinetuneConfig) -> Student | Teacher:
    """Load the student or teacher of ``model``.

    Raises:
        InputError: Its file cannot be used.
    """
    with node_leaders_first("the model"):
        student, teacher = load_any(config.model, config.weights, config.teacher, "teacher=PATH")
    backbone = teacher if student is None else student
    assert backbone is not None  # load_any returns at least one of them
    return backbone


def load_images(config: FinetuneConfig, backbone: Transformer) -> LabelledSet:
    """Load the section ``dataset``.

    Raises:
        InputError: The data set cannot be used, or is smaller than a batch.
    """
    assert config.dataset is not None  # the config's checks
    root, batch_size, sizes = config.dataset.root, config.global_train_batch_size, backbone.encoder.config
    with node_leaders_first("the data set"):
        labelled = load_labelled_set(
            **asdict(config.dataset), image_size=sizes.image_size, interpolation=sizes.interpolation
        )
    if (num_images := labelled.num_images[0]) < batch_size:
        raise InputError(f"global_train_batch_size: must be at most the {num_images} train images, got {batch_size}")
    if min(int(split.labels.min()) for split in labelled[:2]) < 0:
        raise InputError(f"dataset.root: {root}: its labels must be numbers from 0")
    if count_classes(labelled) < 2:
        raise InputError(f"dataset.root: {root}: has one class, expected at least two")
    return labelled


def count_classes(labelled: LabelledSet) -> int:
    """Return the number of classes, by their names and the largest label."""
    return max(len(labelled.class_names), *(int(split.labels.max()) + 1 for split in labelled[:2]))


def build_train_batches(config: FinetuneConfig, labelled: LabelledSet, backbone: Transformer) -> DataLoader:
    """Build the loader of this rank's augmented batches.

    Raises:
        InputError: The node has too little shared memory for them.
    """
    loader, sizes, batch_size = config.train_loader, backbone.encoder.config, config.global_train_batch_size
    height, width = height_and_width(sizes.image_size)
    ranks, on_each = dist.get_local_world_size(), batch_size // dist.get_world_size()
    needed = shared_memory_needed(0, 0, ranks, loader.num_workers, loader.prefetch_factor, on_each * 3 * height * width)
    raise_on_all_ranks(check_shared_memory(needed))
    transform = build_transform(loader, sizes.image_size, sizes.interpolation)
    dataset = AugmentedImages(labelled.train, transform, config.seed)
    return train_batches(dataset, batch_size, loader.num_workers, loader.prefetch_factor)


def describe_model(
    config: FinetuneConfig, backbone: Student | Teacher, embedding: ChosenEmbedding, class_names: tuple[str, ...]
) -> dict[str, Any]:
    """Describe what is fine-tuned, for the run's record; a student so that its export needs no other file."""
    about = {
        "kind": "student" if isinstance(backbone, Student) else "teacher",
        "path": hide_secrets(config.model),
        "sha256": hash_weights(backbone),
        **embedding.headline._asdict(),
        "class_names": list(class_names),
        "provenance": backbone.provenance,
    }
    if not isinstance(backbone, Student):
        return about
    sizes = sizes_of(backbone)
    if config.train_encoder and "outputs" in sizes["encoder"]:
        sizes["encoder"]["outputs"] = ()  # those of the encoder before
    return about | {"sizes": json.loads(json.dumps(sizes))}


def describe_images(config: FinetuneConfig, labelled: LabelledSet) -> dict[str, Any]:
    """Describe the train images, for the run's record."""
    assert config.dataset is not None  # the config's checks
    digest = hashlib.sha256(labelled.train.images.numpy().tobytes())
    digest.update(labelled.train.labels.numpy().tobytes())
    return {
        "location": hide_secrets(config.dataset.root),
        "samples": labelled.num_images[0],
        "sha256": digest.hexdigest(),
    }
