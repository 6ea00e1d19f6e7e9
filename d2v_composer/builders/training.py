"""Build what turns a model into a run: optimizer, schedule, algorithms, callbacks, loggers, retrieval and record."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

import torch
from composer.algorithms import CutMix, LabelSmoothing, MixUp
from composer.core import Algorithm, Callback, Time, TimeUnit
from composer.loggers import LoggerDestination
from composer.optim import ComposerScheduler, CosineAnnealingScheduler, CosineAnnealingWithWarmupScheduler
from composer.utils import FSDP2Config, ParallelismConfig, dist

from d2v_composer.builders.models import build_augmentation, build_labeled_sets
from d2v_composer.callbacks.algorithms import GradientClipping, GradientNorm
from d2v_composer.callbacks.logging import ProgressLogger
from d2v_composer.callbacks.run_record import RunRecord
from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval
from d2v_composer.checkpoints.resume import LOG
from d2v_composer.checkpoints.student_file import choose_embedding
from d2v_composer.config.load import layered
from d2v_composer.config.schema import CALLBACKS, LOGGERS, AlgorithmsConfig, OptimizerConfig, TrainConfig, TrainerConfig
from d2v_composer.data.modalities import modality_of
from d2v_composer.evaluation.evaluate import build_candidates
from d2v_composer.evaluation.labeled_retrieval import Embed
from d2v_composer.evaluation.metrics import TEACHER
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.execution import name_precision
from d2v_composer.system.addresses import RunFolder, hide_secrets
from d2v_composer.system.errors import InputError, errors_of
from d2v_composer.system.machine import describe_machine, package_versions
from d2v_composer.system.ranks import node_leaders_first

# Name in the section ``algorithms`` → what its fields are the arguments of.
ALGORITHMS = {
    "gradient_clipping": GradientClipping,
    "mixup": MixUp,
    "cutmix": CutMix,
    "label_smoothing": LabelSmoothing,
}
# A resume takes these from the checkpoint, or would silently mix old and new ones.
FIXED_IN_ANY_RUN = (
    "data.sha256",  # the position in the order of samples is that data set's
    "config.seed",
    "config.global_train_batch_size",
    "config.train_loader.shuffle",
    "config.train_loader.num_canonical_nodes",
    "config.train_loader.shuffle_block_size",
    "config.train_loader.crop_seconds",  # the order of clips is by their length in a batch
    "config.train_loader.column",
)
FIXED_BY_A_CHECKPOINT = (
    *FIXED_IN_ANY_RUN,
    "config.teacher.model",
    "config.teacher.weights",
    "config.teacher.first_blocks",
    "config.teacher.image_size",
    "config.student",
    "config.prediction",
    "config.targets",
    "config.optimizer",
    "teacher.sha256",
)
FIXED_IN_A_FINETUNING = (
    *FIXED_IN_ANY_RUN,
    "config.first_blocks",
    "config.image_size",
    "config.dataset.column",
    "config.dataset.label_column",
    "config.train_encoder",
    "config.train_loader.stream",
    "config.optimizer",
    "model.representation",
    "model.pooling",
    "model.sha256",
    "model.num_classes",
    "data.test_sha256",
)


def build_optimizer(
    config: OptimizerConfig,
    model: torch.nn.Module,
    depths: Mapping[str, int] | None = None,
    layer_decay: float = 1.0,
) -> torch.optim.AdamW:
    """Build torch's AdamW for the trained parameters, with separate groups for norms and biases.

    Args:
        config: The section.
        model: The model.
        depths: Name of each trained parameter → its depth; default: all are of one.
        layer_decay: Learning rate of a depth over that of the next one; the last one's, whose groups come first, is
            ``lr``.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    depths = depths or dict.fromkeys(weights, 0)
    last = max(depths.values())
    groups: dict[tuple[int, bool], list[torch.nn.Parameter]] = {}
    for name, depth in depths.items():
        groups.setdefault((last - depth, weights[name].ndim <= 1), []).append(weights[name])
    arguments = [
        {
            "params": groups[distance, is_vector],
            "lr": config.lr * layer_decay**distance,
            "weight_decay": 0.0 if is_vector and not config.decay_norms_and_biases else config.weight_decay,
        }
        for distance, is_vector in sorted(groups)
    ]
    return torch.optim.AdamW(arguments, betas=config.betas, eps=config.eps, fused=True)


def build_scheduler(config: TrainerConfig, batches_per_epoch: int) -> ComposerScheduler:
    """Build a linear warm-up, then a cosine decay to ``alpha_f`` times the learning rate.

    Composer needs the warm-up in the unit of ``max_duration``, and never reaches ``lr`` if it is longer than the run.

    Raises:
        InputError: The warm-up is longer than the run, which depends on the data if only one of them is in epochs.
    """
    warmup, duration = map(Time.from_timestring, (config.scheduler.t_warmup, config.max_duration))
    batches = {TimeUnit.BATCH: 1, TimeUnit.EPOCH: batches_per_epoch}
    num_batches = batches[TimeUnit.DURATION] = duration.value * batches[duration.unit]
    num_warmup = int(warmup.value * batches[warmup.unit])
    if num_warmup > num_batches:
        raise InputError(config.long_warmup(f" with {batches_per_epoch} batches per epoch"))
    alpha_f = config.scheduler.alpha_f
    if num_warmup == 0:  # Composer would warn
        return CosineAnnealingScheduler(alpha_f=alpha_f)
    return CosineAnnealingWithWarmupScheduler(t_warmup=Time(num_warmup, TimeUnit.BATCH), alpha_f=alpha_f)


def build_algorithms(config: AlgorithmsConfig) -> list[Algorithm]:
    """Build the algorithms in the order of the section ``algorithms``, and the logger of the gradient norm."""
    chosen = {name: section for name, section in config if section is not None}
    return [*(ALGORITHMS[name](**section.model_dump()) for name, section in chosen.items()), GradientNorm()]


def build_parallelism(config: TrainConfig) -> ParallelismConfig | None:
    """Build the section ``parallelism_config``; even with FSDP, a checkpoint is a single file."""
    fsdp = config.parallelism_config.fsdp
    return None if fsdp is None else ParallelismConfig(fsdp2=FSDP2Config(state_dict_type="full", **fsdp.model_dump()))


def build_callbacks(config: TrainerConfig) -> list[Callback]:
    """Build the section ``callbacks``.

    Raises:
        InputError: A callback does not accept the value of an argument.
    """
    callbacks: list[Callback] = []
    for name, arguments in config.callbacks.items():
        if arguments is not None:
            with errors_of(f"callbacks.{name} with {arguments}"):
                callbacks.append(resolve_name(CALLBACKS[name])(**arguments))
    return callbacks


def build_loggers(config: TrainerConfig, unit: str) -> list[LoggerDestination]:
    """Build the progress logger and the section ``loggers``; by default, they write into the run's folder.

    JSON lines without a file name are left out of a run without a folder. ``unit``: what the samples are called.

    Raises:
        InputError: A logger's package is missing, or it refuses the value of an argument.
    """
    loggers: list[LoggerDestination] = [ProgressLogger(sys.stderr.isatty(), unit=unit)] if config.progress_bar else []
    folder = config.run_folder
    for name, arguments in config.loggers.items():
        if arguments is None or (name == "jsonl" and folder is None and "filename" not in arguments):
            continue
        with errors_of(f"loggers.{name}"):
            defaults = {} if folder is None else places(name, folder)
            loggers.append(resolve_name(LOGGERS[name])(**layered(defaults, arguments)))
    return loggers


def places(name: str, folder: RunFolder) -> dict[str, Any]:
    """Return the arguments that let a logger write into the run's folder, unless the environment sets its location."""
    local = folder.local.absolute()
    if name == "jsonl":
        return {"filename": str(folder.local / LOG)}
    if name == "tensorboard":
        return {"log_dir": str(local / "tensorboard_logs")}
    if name == "mlflow" and not {"MLFLOW_TRACKING_URI", "DATABRICKS_TOKEN"} & os.environ.keys():
        return {"tracking_uri": (local / "mlruns").as_uri()}
    if name == "wandb":
        # In a clone, W&B keeps a git process that ignores SIGTERM as we do, and waits for its end forever.
        os.environ.setdefault("WANDB_DISABLE_GIT", "true")
        return {} if "WANDB_DIR" in os.environ else {"init_kwargs": {"dir": str(local)}}
    return {}


def build_run_record(config: TrainerConfig, fixed: tuple[str, ...], **contents: Mapping[str, Any]) -> RunRecord:
    """Build the record of config, model, data and machine that is saved in the run's folder and checkpoints.

    A ``sha256`` in the ``contents`` identifies weights or samples. ``fixed``: see :class:`RunRecord`.
    """
    sys.argv = hide_secrets(sys.argv)  # W&B records it, too
    record = {
        "config": config.model_dump(mode="json"),
        "command": re.sub("^'(d2v [a-z]+)'", r"\1", shlex.join(sys.argv)),
        **contents,
        "versions": package_versions(),
        "hardware": {
            **describe_machine(),
            "ranks": dist.get_world_size(),
            "precision": name_precision(config.precision),
        },
    }
    return RunRecord(record, config.run_folder and config.run_folder.local, fixed)


def build_retrieval(config: TrainConfig, model: DistillationModel) -> ZeroShotRetrieval | None:
    """Build the section ``retrieval``; ``None`` if it has no data sets.

    Raises:
        InputError: A data set cannot be used.
    """
    retrieval = config.retrieval
    if not any(retrieval.datasets.values()):
        return None
    primary, student, baselines = choose_embeds(config, model)
    sizes = model.teacher.config
    with node_leaders_first("the data sets for retrieval"):
        datasets = build_labeled_sets(retrieval, modality_of(sizes))
    with errors_of("retrieval"):
        return ZeroShotRetrieval(
            datasets,
            retrieval.interval,
            retrieval.ks,
            embed=student,
            primary=primary,
            baselines=baselines,
            at_start=retrieval.at_start,
            probes=retrieval.probes,
            augment=build_augmentation(config.train_loader, sizes, config.seed, for_views=True),
            device_batch_size=config.device_eval_batch_size,
            progress_bar=config.progress_bar,
        )


def choose_embeds(config: TrainConfig, model: DistillationModel) -> tuple[str, Embed, dict[str, Embed]]:
    """Return the name of the primary embedding, and what computes those of the student and of each baseline.

    Raises:
        InputError: The section ``retrieval`` names others.
    """
    retrieval = config.retrieval
    with errors_of("retrieval"):
        primary = choose_embedding(model.student, retrieval.pooling, retrieval.representation).name
    models = {TEACHER: model.teacher, "student": model.student}
    *others, student = build_candidates(model.teacher, models, model.layer_mean)
    known = {each.name: model.in_precision(each.embed) for each in others}
    if unknown := [name for name in retrieval.baselines if name not in known]:
        allowed = ", ".join(known)
        raise InputError(f"retrieval.baselines: must be among {allowed} with this teacher, got {unknown[0]}")
    return primary, model.in_precision(student.embed), {name: known[name] for name in retrieval.baselines}
