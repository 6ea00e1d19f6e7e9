"""Build the retrieval callback."""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

import torch
from composer.algorithms import CutMix, GradientClipping, LabelSmoothing, MixUp
from composer.core import Algorithm, Callback, Time, TimeUnit
from composer.optim import ComposerScheduler, CosineAnnealingScheduler, CosineAnnealingWithWarmupScheduler
from composer.utils import FSDP2Config, ParallelismConfig, dist

from d2v_composer.builders.models import build_labeled_sets
from d2v_composer.builders.run_folder import errors_of, find_run_folder
from d2v_composer.callbacks import CheckpointRetention, GracefulStop, RunFolderLock, RunRecord, ZeroShotRetrieval
from d2v_composer.callbacks.algorithms import EMA, GradientNorm
from d2v_composer.callbacks.yaml_names import CALLBACKS
from d2v_composer.checkpoints.student_file import PrimaryEmbedding
from d2v_composer.config.load import describe_long_warmup
from d2v_composer.config.schema import (
    AlgorithmsConfig,
    ClassifierAlgorithmsConfig,
    FinetuneConfig,
    LayerwiseOptimizerConfig,
    OptimizerConfig,
    TrainConfig,
    TrainerConfig,
)
from d2v_composer.data.index import describe_data
from d2v_composer.evaluation.evaluate import build_embeds
from d2v_composer.evaluation.labeled_retrieval import Embed
from d2v_composer.models.classification import Classifier
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.teacher import Teacher
from d2v_composer.system.addresses import hide_all_secrets, hide_secrets
from d2v_composer.system.errors import InputError
from d2v_composer.system.machine import OUR_PACKAGES, describe_machine, package_versions
from d2v_composer.system.ranks import node_leaders_first

# MERGED FROM d2v_composer/builders/training.py: Build optimizer, schedule, gradient clipping and sharding.


def build_optimizer(config: OptimizerConfig, model: torch.nn.Module) -> torch.optim.AdamW:
    """Build torch's AdamW of the trained parameters; norms and biases have a group of their own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, vectors = [each for each in trained if each.ndim > 1], [each for each in trained if each.ndim <= 1]
    return _adamw(config, [{"params": matrices}, {"params": vectors}])


def build_layerwise_optimizer(config: LayerwiseOptimizerConfig, model: Classifier) -> torch.optim.AdamW:
    """Build torch's AdamW with a learning rate for each depth; the head's group, with ``lr``, comes first."""
    head, weights = max(model.depth_of_trained.values()), dict(model.named_parameters())
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, depth in model.depth_of_trained.items():
        groups.setdefault((head - depth, weights[name].ndim <= 1), []).append(weights[name])
    ordered = sorted(groups)
    return _adamw(
        config, [{"params": groups[each], "lr": config.lr * config.layer_decay ** each[0]} for each in ordered]
    )


def _adamw(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """Build torch's AdamW of groups that each have matrices or norms and biases alone."""
    for group in groups:
        decays = config.decay_norms_and_biases or any(each.ndim > 1 for each in group["params"])
        group["weight_decay"] = config.weight_decay if decays else 0.0
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def build_scheduler(config: TrainerConfig, batches_per_epoch: int) -> ComposerScheduler:
    """Build a linear warm-up, then a cosine that ends at ``alpha_f`` of the learning rate.

    Raises:
        InputError: The warm-up is longer than the run. If only one of them is in epochs, this depends on the data.
    """
    warmup, duration = map(Time.from_timestring, (config.scheduler.t_warmup, config.max_duration))
    batches = {TimeUnit.BATCH: 1, TimeUnit.EPOCH: batches_per_epoch}
    num_batches = batches[TimeUnit.DURATION] = duration.value * batches[duration.unit]
    num_warmup = int(warmup.value * batches[warmup.unit])
    if num_warmup > num_batches:
        raise InputError(describe_long_warmup(config, f" with {batches_per_epoch} batches an epoch"))
    alpha_f = config.scheduler.alpha_f
    if num_warmup == 0:  # Composer would warn
        return CosineAnnealingScheduler(alpha_f=alpha_f)
    return CosineAnnealingWithWarmupScheduler(t_warmup=Time(num_warmup, TimeUnit.BATCH), alpha_f=alpha_f)


def build_algorithms(config: AlgorithmsConfig) -> list[Algorithm]:
    """Build the section ``algorithms``, and the logger of the gradient's norm."""
    clipping = config.gradient_clipping
    if clipping is None:
        return [GradientNorm()]
    return [GradientClipping(clipping_type="norm", clipping_threshold=clipping.clipping_threshold), GradientNorm()]


def build_classifier_algorithms(config: ClassifierAlgorithmsConfig) -> list[Algorithm]:
    """Build the section ``algorithms`` of a fine-tuning; labels are mixed before they are smoothed."""
    algorithms = build_algorithms(config)
    if config.mixup is not None:
        algorithms.append(MixUp(**asdict(config.mixup)))
    if config.cutmix is not None:
        algorithms.append(CutMix(**asdict(config.cutmix)))
    if config.label_smoothing is not None:
        algorithms.append(LabelSmoothing(**asdict(config.label_smoothing)))
    if config.ema is not None:
        algorithms.append(EMA(**asdict(config.ema)))
    return algorithms


def build_parallelism(config: TrainConfig) -> ParallelismConfig | None:
    """Build the section ``parallelism_config``; a checkpoint is one file all the same."""
    fsdp = config.parallelism_config.fsdp
    return None if fsdp is None else ParallelismConfig(fsdp2=FSDP2Config(state_dict_type="full", **asdict(fsdp)))


# MERGED FROM d2v_composer/builders/training.py: Build callbacks and the run's record.

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
    "config.targets.normalization",
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
    return RunRecord(record, local, prefix, fixed)


def build_retrieval(config: TrainConfig, model: DistillationModel) -> ZeroShotRetrieval | None:
    """Build the section ``retrieval``; ``None`` if it has no data sets.

    Raises:
        InputError: A data set cannot be used.
    """
    retrieval = config.retrieval
    if not any(retrieval.datasets.values()):
        return None
    with node_leaders_first("the data sets for retrieval"):
        sizes = model.teacher.config
        datasets = build_labeled_sets(retrieval, sizes.image_size, sizes.interpolation)
    embeds = build_run_embeds(model)
    try:
        return ZeroShotRetrieval(
            datasets,
            retrieval.interval,
            retrieval.ks,
            embed=embeds["student"],
            primary=PrimaryEmbedding(retrieval.representation, retrieval.pooling).name,
            baselines={name: embeds[name] for name in retrieval.baselines},
            at_start=retrieval.at_start,
            probes=retrieval.probes,
            device_batch_size=config.device_eval_batch_size,
            progress_bar=config.progress_bar,
        )
    except ValueError as error:
        raise InputError(f"retrieval: {error}") from error


def build_run_embeds(model: DistillationModel) -> dict[str, Embed]:
    """Return the embed functions of pixels, encoder, student and teacher, in the run's precision."""
    embeds = build_embeds(model.teacher.encoder, {"student": model.student, "teacher": model.teacher})
    return {name: model.in_precision(embed) for name, embed in embeds.items()}
