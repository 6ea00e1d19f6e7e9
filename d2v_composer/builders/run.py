"""A run from top to bottom: config → model, data, Trainer; ``fit.py`` trains, reports and closes."""

import hashlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from composer import Trainer
from composer.algorithms import CutMix, LabelSmoothing, MixUp
from composer.core import Algorithm, Callback, Time, TimeUnit
from composer.loggers import LoggerDestination
from composer.models import ComposerModel
from composer.optim import ComposerScheduler, CosineAnnealingScheduler, CosineAnnealingWithWarmupScheduler
from composer.utils import dist

from d2v_composer.builders.data import build_train_loader, read_train_index
from d2v_composer.builders.fit import fit_and_close, join_and_seed, write_run_report
from d2v_composer.builders.models import build_augmentation, build_labeled_sets, check_network
from d2v_composer.callbacks.algorithms import GradientClipping, GradientNorm, SeededBatches
from d2v_composer.callbacks.checkpointing import Checkpoints, NanGuard
from d2v_composer.callbacks.logging import ProgressLogger, Throughput, Uploads
from d2v_composer.callbacks.run_record import RunRecord
from d2v_composer.callbacks.target_statistics import TargetStatistics
from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval
from d2v_composer.checkpoints.checkpoint import (
    LOG,
    Checkpoint,
    download_checkpoint,
    drop_unused_scaler,
    find_newest,
    read_checkpoint,
)
from d2v_composer.checkpoints.load import load_teacher
from d2v_composer.checkpoints.student_file import choose_embedding, sha256
from d2v_composer.config.load import layered
from d2v_composer.config.schema import (
    CALLBACKS,
    LOGGERS,
    AlgorithmsConfig,
    OptimizerConfig,
    TeacherSection,
    TrainConfig,
    TrainerConfig,
)
from d2v_composer.data.modalities import MODALITIES, modality_of
from d2v_composer.evaluation.evaluate import build_candidates, cost
from d2v_composer.evaluation.labeled_retrieval import Embed, last_batch
from d2v_composer.evaluation.metrics import STUDENT, TEACHER
from d2v_composer.models.compilation import compile_model, find_missing
from d2v_composer.models.distillation import DistillationModel, check_tensors
from d2v_composer.models.precision import choose_precision, name_precision
from d2v_composer.models.teacher import Teacher
from d2v_composer.report.tables import format_tables
from d2v_composer.system.addresses import Address, RunFolder, hide_secrets
from d2v_composer.system.errors import InputError, errors_of, reading
from d2v_composer.system.fetch import cache_folder
from d2v_composer.system.machine import describe_machine, package_versions
from d2v_composer.system.processes import num_nodes
from d2v_composer.system.ranks import node_leaders_first, rank_zero_first
from d2v_composer.system.third_party import patched_composer

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
    "config.objectives",
    "config.optimizer",
    "teacher.sha256",
)


def train_student(
    config: TrainConfig,
    callbacks: Sequence[Callback] = (),
    *,
    teacher: Teacher | None = None,
    when_built: Callable[[Trainer], object] = lambda trainer: None,
) -> Trainer:
    """Train a student, from the run's last checkpoint if there is one, and report. Call it on every rank.

    Args:
        config: The run's.
        callbacks: Further callbacks, besides the YAML's.
        teacher: The config's teacher, if it is loaded already.
        when_built: Called with the Trainer before the training, when no bad input can end the run anymore.

    Raises:
        InputError: A file, data set or setting cannot be used.
        RunError: The run failed in a foreseen way.
    """
    join_and_seed(config)
    model = build_model(config, teacher)
    modality, loader = modality_of(model.teacher.config), config.train_loader
    index = read_train_index(loader, modality, config.global_train_batch_size)
    transform = build_augmentation(loader, modality, config.seed).transform
    sizes = config.global_train_batch_size, config.seed
    train_loader = build_train_loader(loader, index, transform, *sizes, is_compiled=config.compile is not False)
    if config.targets.normalization == "dataset" and config.objectives.tokens.weight:
        measure = TargetStatistics(config.targets.dataset_batches or 100, config.device_eval_batch_size)
        callbacks = [measure, *callbacks]
    retrieval = build_retrieval(config, model)
    data = {"modality": modality.name, "location": loader.remote or loader.local, **index.describe()}
    costs = {STUDENT: cost(model.student), TEACHER: cost(model.teacher)}
    record = build_run_record(config, FIXED_BY_A_CHECKPOINT, teacher=model.teacher.provenance, data=data, costs=costs)
    trainer = build_trainer(
        config,
        model,
        record,
        [SeededBatches(config.seed), *([] if retrieval is None else [retrieval])],
        callbacks,
        train_dataloader=train_loader,
        optimizers=build_optimizer(config.optimizer, model),
        schedulers=build_scheduler(config, len(train_loader)),
        algorithms=build_algorithms(config.algorithms),
    )
    when_built(trainer)
    header = {modality.unit: f"{data['samples']:,} in {data['location']}"}
    if retrieval is not None:
        sets = ", ".join(retrieval.datasets)
        header["retrieval"] = f"{sets} every {config.retrieval.interval}, primary embedding {retrieval.lookup.primary}"

    def report() -> None:
        if retrieval is not None and retrieval.history:
            embedding = f"{retrieval.lookup.primary}, batch {last_batch(retrieval.results)}"
            print(f"\n{format_tables(retrieval.results, retrieval.datasets, embedding)}")
        write_run_report(trainer, config, retrieval)

    fit_and_close(trainer, config, header, report)
    return trainer


def build_trainer(
    config: TrainerConfig,
    model: ComposerModel,
    record: RunRecord,
    own: Sequence[Callback] = (),
    callbacks: Sequence[Callback] = (),
    **arguments: Any,
) -> Trainer:
    """Build the Trainer with the arguments that all runs share, and lock the run's folder.

    Args:
        config: The run's.
        model: What it trains.
        record: What it writes about itself.
        own: Callbacks of this kind of run, which a checkpoint may have saved.
        callbacks: Further callbacks, besides the YAML's.
        **arguments: The Trainer's other arguments.

    Raises:
        InputError: The folder is in use, or the checkpoint is another run's; or a callback or logger cannot be used.
    """
    chosen, unit = build_callbacks(config), MODALITIES[record.record["data"]["modality"]].unit
    folder = config.run_folder
    uploads = None if folder is None or folder.address is None else Uploads(folder.address)
    # First lock the folder, then select the checkpoint in it: another run could still write one.
    advice = "; the same command resumes" if config.autoresume else ""
    checkpoints = Checkpoints(folder, config.save_interval, config.save_num_checkpoints_to_keep, uploads, advice)

    def accept(found: Checkpoint) -> None:
        """Check that the run may go on from a checkpoint, before a file is written or a tensor loaded."""
        with errors_of(str(found.path)):
            for callback in (record, *own):  # another program has saved others: its tensors are compared
                if saved := found.saved_by(type(callback).__name__):
                    callback.load_state_dict(dict(saved))
            check_tensors(model, found.tensors, "")

    checkpoint, precision = find_checkpoint(config, accept), choose_precision(config.precision).trainer
    with patched_composer(checkpoint and checkpoint.contents):
        return Trainer(
            model=model,
            max_duration=config.max_duration,
            callbacks=[record, Throughput(), NanGuard(), checkpoints, *own, *chosen, *callbacks],
            loggers=[*build_loggers(config, unit), *([] if uploads is None else [uploads])],
            progress_bar=False,  # ours is among the loggers
            precision=precision,
            device_train_microbatch_size=config.device_train_microbatch_size,
            seed=config.seed,
            run_name=config.run_name,
            load_path=checkpoint and str(checkpoint.path),  # instead of Composer's autoresume
            load_ignore_keys=partial(drop_unused_scaler, precision=precision),
            **arguments,
        )


def build_model(config: TrainConfig, teacher: Teacher | None = None) -> DistillationModel:
    """Build the model from the sections ``teacher``, ``student``, ``prediction`` and ``targets``, and compile it.

    Raises:
        InputError: The teacher's file cannot be used, or another setting does not fit it.
    """
    with node_leaders_first("the teacher"):
        teacher = teacher or build_teacher(config)
    model = join_student(config, teacher)
    if config.compile:
        compile_model(model, config.compile)
    if config.activation_checkpointing:
        with errors_of("activation_checkpointing"):  # timm has none for some models
            model.student.checkpoint_activations()
    return model


def join_student(config: TrainConfig, teacher: Teacher) -> DistillationModel:
    """Build the student and its objectives on a teacher, as one model.

    Raises:
        InputError: A setting does not fit it.
    """
    targets, precision, depth = config.targets, choose_precision(config.precision), teacher.config.depth
    objectives = config.objectives
    if (top_k := targets.average_top_k_layers) is not None and top_k > depth:
        raise InputError(f"targets.average_top_k_layers: must be at most the teacher's depth {depth}, got {top_k}")
    if config.compile and (missing := find_missing()) is not None:
        raise InputError(f"compile: {missing}; install it, or set compile=false")
    with errors_of("student"):
        layer_mean = targets.model_dump(include={"normalization", "final_layer_norm"})
        layer_mean["projected"] = objectives.embedding.weight > 0
        student = teacher.build_student(**config.student.model_dump(), **layer_mean)
    check_network("student.model", student, config)
    teacher.encoder.half_residual = config.half_residual
    teacher.cast_weights(precision.dtype)
    with errors_of("targets"):
        return DistillationModel(
            teacher,
            student,
            config.prediction,
            targets.extra_tokens,
            top_k,
            precision.cpu_bf16,
            targets.source,
            **objectives.tokens.model_dump(),
            embedding_weight=objectives.embedding.weight,
            dataset_norm=targets.normalization == "dataset",
        )


def build_teacher(config: TrainConfig) -> Teacher:
    """Load the teacher that the section ``teacher`` describes, with its image embedding if an objective needs it.

    Raises:
        InputError: Its file cannot be used.
    """
    section = config.teacher.model_dump()
    try:
        return load_teacher(section.pop("checkpoint"), **section, projected=config.objectives.embedding.weight > 0)
    except InputError as error:
        key = "teacher." if str(error).startswith(tuple(TeacherSection.model_fields)) else "teacher.checkpoint: "
        raise InputError(f"{key}{error}") from error


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


def build_callbacks(config: TrainerConfig) -> list[Callback]:
    """Build the callbacks that the section ``callbacks`` names.

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
    modality = modality_of(model.teacher.config)
    with node_leaders_first("the data sets for retrieval"):
        datasets = build_labeled_sets(retrieval, modality, model.student.projected_width)
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
            augment=build_augmentation(config.train_loader, modality, config.seed, for_views=True),
            device_batch_size=config.device_eval_batch_size,
            progress_bar=config.progress_bar,
        )


def choose_embeds(config: TrainConfig, model: DistillationModel) -> tuple[str, Embed, dict[str, Embed]]:
    """Return the primary embedding's name, and the functions that embed with student and baselines.

    Raises:
        InputError: The section ``retrieval`` names others.
    """
    retrieval = config.retrieval
    with errors_of("retrieval"):
        primary = choose_embedding(model.student, retrieval.pooling, retrieval.representation).name
    models = {TEACHER: model.teacher, STUDENT: model.student}
    fill_to = config.device_eval_batch_size if config.compile else 0
    *others, student = build_candidates(model.teacher, models, model.layer_mean, fill_to)
    known = {each.name: partial(model.compute, each.embed) for each in others}
    if unknown := [name for name in retrieval.baselines if name not in known]:
        allowed = ", ".join(known)
        raise InputError(f"retrieval.baselines: must be among {allowed} with this teacher, got {unknown[0]}")
    return primary, partial(model.compute, student.embed), {name: known[name] for name in retrieval.baselines}


def find_checkpoint(config: TrainerConfig, accept: Callable[[Checkpoint], None]) -> Checkpoint | None:
    """Read the run's newest checkpoint or, for a new run, the one in ``load_path``: the same one on every rank.

    ``accept`` raises on each rank if the run cannot go on from it.

    Raises:
        InputError: It is corrupt, cannot be read, leaves nothing to train, or ``recipes/train.py`` did not write it; or
            the folder has one, and ``autoresume`` is false.
    """
    folder = config.run_folder
    if folder is not None and (newest := _share_newest(folder, config.autoresume, accept)) is not None:
        return newest
    if config.load_path is None:
        return None
    is_remote = Address.parse(config.load_path).is_remote
    cached = f"checkpoints/{hashlib.sha256(config.load_path.encode()).hexdigest()[:16]}.pt"
    path = cache_folder() / cached if is_remote else Path(config.load_path)
    with node_leaders_first("the checkpoint"), errors_of("load_path"):
        if is_remote and dist.get_local_rank() == 0:
            download_checkpoint(config.load_path, path)
        found, length = read_checkpoint(path), config.max_duration
    with reading(path):
        if found.trained({"ba": "batch", "ep": "epoch"}[length[-2:]]) >= int(length[:-2]):
            raise InputError(
                f"load_path: {config.load_path}: batch {found.trained('batch')} is not before max_duration {length}; "
                "set a larger max_duration"
            )
    accept(found)
    return found


def _share_newest(folder: RunFolder, resumes: bool, accept: Callable[[Checkpoint], None]) -> Checkpoint | None:
    """Bring rank 0's newest checkpoint to every node, and read it; ``None`` for a new run.

    Raises:
        InputError: A node cannot get it, or has another of that name: nodes would train different weights.
    """
    on_several_nodes = num_nodes() > 1
    newest, shared = None, [("", "")]
    with rank_zero_first("the newest checkpoint"):
        if dist.get_global_rank() == 0:
            newest = find_newest(folder, accept, resumes=resumes, uploads=on_several_nodes)
            if newest is not None:
                shared = [(newest.path.name, sha256(newest.path) if on_several_nodes else "")]
    dist.broadcast_object_list(shared)
    name, digest = shared[0]
    if not name:
        return None
    path, address = folder.local / name, folder.address and f"{folder.address}/{name}"
    with node_leaders_first("the checkpoint"), reading(path):
        if on_several_nodes and dist.get_local_rank() == 0 and not (path.is_file() and sha256(path) == digest):
            if address is not None:
                download_checkpoint(address, path)
            if sha256(path) != digest:
                raise InputError(f"{address or path} differs from the checkpoint with that name on node 0")
        if newest is None:
            accept(newest := read_checkpoint(path))
        return newest
