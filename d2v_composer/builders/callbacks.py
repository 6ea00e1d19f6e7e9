"""Build callbacks and the run's record."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from composer.core import Callback
from composer.utils import dist

from d2v_composer.builders.errors import errors_of
from d2v_composer.builders.run_folder import find_run_folder
from d2v_composer.callbacks import CheckpointRetention, GracefulStop, RunFolderLock, RunRecord
from d2v_composer.callbacks.yaml_names import CALLBACKS
from d2v_composer.config.finetune import FinetuneConfig, LayerwiseOptimizerConfig
from d2v_composer.config.schema import OptimizerConfig, TrainConfig, TrainerConfig
from d2v_composer.data.mds_index import describe_data
from d2v_composer.models.names import DATA2VEC2
from d2v_composer.models.teacher import Teacher
from d2v_composer.system.addresses import hide_all_secrets, hide_secrets
from d2v_composer.system.machine_info import OUR_PACKAGES, describe_machine, package_versions

__all__ = [
    "build_callbacks",
    "build_finetuning_record",
    "build_folder_callbacks",
    "build_graceful_stop",
    "build_run_record",
]

# A resume takes these from the checkpoint, or would silently mix old and new ones.
FIXED_BY_A_CHECKPOINT = (
    "config.seed",
    "config.global_train_batch_size",
    "config.teacher.model",
    "config.teacher.weights",
    "config.teacher.first_blocks",
    "config.teacher.image_size",
    "config.student",
    "config.prediction",
    "config.targets.extra_tokens",
    "config.targets.average_top_k_layers",
    "config.targets.source",
    "config.targets.normalisation",
    *(f"config.optimizer.{field.name}" for field in fields(OptimizerConfig)),
    "config.train_loader.shuffle",
    "config.train_loader.num_canonical_nodes",
    "config.train_loader.shuffle_block_size",
    "teacher.sha256",
)
FIXED_IN_A_FINETUNING = (
    "config.seed",
    "config.global_train_batch_size",
    "config.first_blocks",
    "config.image_size",
    "config.dataset.column",
    "config.dataset.label_column",
    "config.train_encoder",
    "config.from_scratch",
    "config.algorithms.ema",
    "config.train_loader.stream",
    "config.train_loader.shuffle",
    "config.train_loader.num_canonical_nodes",
    "config.train_loader.shuffle_block_size",
    *(f"config.optimizer.{field.name}" for field in fields(LayerwiseOptimizerConfig)),
    "model.representation",
    "model.pooling",
    "model.sha256",
    "model.num_classes",
    "model.class_names",
)
# What checkpoints from before these keys were trained with.
BEFORE_THESE_KEYS = {
    "config.teacher.model": DATA2VEC2,
    "config.targets.source": "ffn",
    "config.targets.normalisation": "instance",
    "config.optimizer.decay_norms_and_biases": False,
    "config.train_loader.stream": False,
    "config.train_loader.shuffle": True,
    "config.train_loader.num_canonical_nodes": 1,
    "config.train_loader.shuffle_block_size": 1 << 16,
}


def build_folder_callbacks(config: TrainerConfig) -> list[Callback]:
    """Lock ``save_folder`` for this run, and build the callbacks that manage it.

    Raises:
        InputError: Another run trains there.
    """
    folder = find_run_folder(config)
    if folder is None:
        return []
    return [
        RunFolderLock(folder.local, folder.address),
        CheckpointRetention(folder.local, folder.prefix, config.save_num_checkpoints_to_keep),
    ]


def build_graceful_stop(config: TrainerConfig) -> GracefulStop:
    """Build the callback that stops the run on a signal."""
    if config.save_folder is None:
        return GracefulStop(config.save_interval, "; nothing is saved, for save_folder is null")
    advice = "; the same command resumes" if config.autoresume else ""
    return GracefulStop(config.save_interval, f" in {hide_secrets(config.save_folder)}{advice}")


def build_callbacks(config: TrainerConfig) -> list[Callback]:
    """Build the section ``callbacks``.

    Raises:
        InputError: A callback refuses the value of an argument.
    """
    callbacks: list[Callback] = []
    for name, arguments in config.callbacks.items():
        if arguments is not None:
            with errors_of(f"callbacks.{name}"):
                callbacks.append(CALLBACKS[name](**arguments))
    return callbacks


def build_run_record(config: TrainConfig, teacher: Teacher, shards: list[dict[str, Any]]) -> RunRecord:
    """Build the record of config, teacher, data and machine, which the run's folder and checkpoints keep.

    Args:
        config: The run's.
        teacher: As loaded.
        shards: Those of the training images, as the index lists them.
    """
    loader = config.train_loader
    data = {"location": loader.remote or loader.local, **describe_data(shards)}
    return _build_record(config, {"teacher": teacher.provenance, "data": data}, FIXED_BY_A_CHECKPOINT)


def build_finetuning_record(config: FinetuneConfig, model: Mapping[str, Any], data: Mapping[str, Any]) -> RunRecord:
    """Build the record of a fine-tuning.

    Args:
        config: The run's.
        model: What is fine-tuned; ``sha256`` identifies its weights.
        data: What it is trained on; ``sha256`` identifies the images and their labels.
    """
    return _build_record(config, {"model": model, "data": data}, FIXED_IN_A_FINETUNING)


def _build_record(config: TrainerConfig, contents: Mapping[str, Any], fixed: tuple[str, ...]) -> RunRecord:
    record = {
        "config": hide_all_secrets(asdict(config)),
        "command": shlex.join(map(hide_secrets, sys.argv)),
        **contents,
        "versions": package_versions(*OUR_PACKAGES),
        "hardware": {**describe_machine(), "ranks": dist.get_world_size()},
    }
    folder = find_run_folder(config)
    local, prefix = (None, None) if folder is None else (folder.local, folder.prefix)
    return RunRecord(record, local, prefix, fixed, BEFORE_THESE_KEYS)
