"""Build a whole fine-tuning from its config: the entry of this package for recipes/finetune.py."""

import json
from typing import Any, NamedTuple

from composer.core import DataSpec, Evaluator

from d2v_composer.builders.callbacks import build_finetuning_record
from d2v_composer.builders.finetune_images import FinetuneImages, build_images
from d2v_composer.builders.loggers import ask_logging_servers
from d2v_composer.builders.optimization import (
    build_classifier_algorithms,
    build_layerwise_optimizer,
    build_scheduler,
)
from d2v_composer.builders.run import build_trainer_arguments
from d2v_composer.builders.trained_model import load_trained_model
from d2v_composer.callbacks import RunRecord, SeededBatches
from d2v_composer.checkpoints.finetuned import without_head
from d2v_composer.checkpoints.headline import ChosenEmbedding, choose_embedding
from d2v_composer.checkpoints.stored_config import sizes_of
from d2v_composer.config.finetune import FinetuneConfig
from d2v_composer.data.labelled_batches import eval_batches
from d2v_composer.embedding.embed import hash_weights
from d2v_composer.models.classification import Classifier, randomize
from d2v_composer.models.precision import choose_precision
from d2v_composer.models.student import Student
from d2v_composer.models.teacher import Teacher
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.multi_node import node_leaders_first

__all__ = ["EVALUATOR", "BuiltFinetuning", "build_finetuning"]

EVALUATOR = "test"
"""The evaluation's name in metrics: metrics/test/top1."""


class BuiltFinetuning(NamedTuple):
    """A fine-tuning that is ready to train."""

    trainer_arguments: dict[str, Any]
    """Arguments of Composer's Trainer."""
    model: Classifier
    record: RunRecord
    images: FinetuneImages


def build_finetuning(config: FinetuneConfig) -> BuiltFinetuning:
    """Build everything that a fine-tuning needs, and lock its folder.

    Call it on every rank, after they have joined.

    Raises:
        InputError: A file, data set or setting cannot be used.
    """
    ask_logging_servers(config)
    backbone = load_backbone(config)
    embedding = choose_embedding(backbone, backbone.provenance, config.pooling, config.representation)
    images = build_images(config, backbone.encoder.config)
    about = describe_model(config, backbone, embedding, images)
    if config.from_scratch:
        randomize(backbone)
    cpu_bf16 = choose_precision(config.precision).cpu_bf16
    model = Classifier(backbone, images.num_classes, *embedding.headline, config.train_encoder, cpu_bf16)
    eval_loader = eval_batches(images.test, config.device_eval_batch_size)
    record = build_finetuning_record(config, about, images.about)
    arguments = {
        "model": model,
        "train_dataloader": DataSpec(images.train_loader, microbatch_transforms=model.prepare),
        "eval_dataloader": Evaluator(
            label=EVALUATOR, dataloader=DataSpec(eval_loader, microbatch_transforms=model.prepare)
        ),
        "eval_interval": config.eval_interval,
        "optimizers": build_layerwise_optimizer(config.optimizer, model),
        "schedulers": build_scheduler(config, len(images.train_loader)),
        "algorithms": build_classifier_algorithms(config.algorithms),
        **build_trainer_arguments(config, record, [SeededBatches(config.seed)]),
    }
    return BuiltFinetuning(arguments, model, record, images)


def load_backbone(config: FinetuneConfig) -> Student | Teacher:
    """Load the student or teacher of ``model``, without the head of an earlier fine-tuning.

    Raises:
        InputError: Its file cannot be used.
    """
    with node_leaders_first("the model"):
        student, teacher = load_trained_model(config)
    backbone = teacher if student is None else without_head(student)
    assert backbone is not None  # one of them is there
    return backbone


def describe_model(
    config: FinetuneConfig, backbone: Student | Teacher, embedding: ChosenEmbedding, images: FinetuneImages
) -> dict[str, Any]:
    """Describe what is fine-tuned, for the run's record; a student so that its export needs no other file."""
    about = {
        "kind": "student" if isinstance(backbone, Student) else "teacher",
        "path": hide_secrets(config.model),
        "sha256": hash_weights(backbone),
        **embedding.headline._asdict(),
        "num_classes": images.num_classes,
        "class_names": list(images.class_names),
        "provenance": backbone.provenance,
    }
    if not isinstance(backbone, Student):
        return about
    sizes = sizes_of(backbone)
    if config.train_encoder and "outputs" in sizes["encoder"]:
        sizes["encoder"]["outputs"] = ()  # those of the encoder before
    return about | {"sizes": json.loads(json.dumps(sizes))}
