"""One ``build_*`` for each section of the config: from checked values to the Trainer's arguments."""

import hashlib
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from composer.algorithms import GradientClipping
from composer.core import Algorithm, Callback, Time, TimeUnit
from composer.loggers import LoggerDestination
from composer.optim import CosineAnnealingWithWarmupScheduler
from composer.utils import (
    FSDP2Config,
    ParallelismConfig,
    dist,
    maybe_create_remote_uploader_downloader_from_uri,
)
from streaming.base.util import bytes_to_int
from torch.utils.data import DataLoader

from d2v_composer.addresses import Address, RunFolder, check_path, hide_secrets
from d2v_composer.algorithms import GradientNorm
from d2v_composer.callbacks import CheckpointKeeping, RunRecord, SoleRun, ZeroShotRetrieval
from d2v_composer.callbacks.checkpoint_keeping import PATIENT_CLIENT
from d2v_composer.callbacks.zero_shot_retrieval import Embed
from d2v_composer.config import (
    CALLBACKS,
    LOGGERS,
    EvaluateConfig,
    LabelledSetConfig,
    OptimizerConfig,
    TrainConfig,
    compute_dtype,
)
from d2v_composer.data.labelled import LabelledSet, load_labelled_set
from d2v_composer.data.mds import (
    RoomNeeded,
    check_image_column,
    check_room,
    describe_data,
    fetch_index,
    read_index,
    room_needed,
)
from d2v_composer.data.sample_order import Share, shards_of_node
from d2v_composer.data.shared_memory import check_shared_memory, shared_memory_needed
from d2v_composer.data.streaming_images import StreamingImages
from d2v_composer.data.transforms import RandomResizedCropFlip
from d2v_composer.data.verified_stream import ShardError
from d2v_composer.environment import OUR_PACKAGES, describe_machine, package_versions
from d2v_composer.errors import InputError
from d2v_composer.evaluation import Candidate
from d2v_composer.fetch import cache_folder
from d2v_composer.loggers import Progress
from d2v_composer.models.compilation import compile_model
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.load import load_any, load_teacher
from d2v_composer.models.student import Student
from d2v_composer.nodes import (
    COLLECTIVE_SECONDS,
    gather_objects,
    node_leaders_first,
    raise_on_all_ranks,
    rank_zero_first,
)
from d2v_composer.persistence import reason
from d2v_composer.processes import FORK
from d2v_composer.references import embed_with_encoder, pixels
from d2v_composer.resuming import bring_checkpoint, check_checkpoint, fetch_checkpoint, find_newest_checkpoint

__all__ = [
    "build_algorithms",
    "build_callbacks",
    "build_candidates",
    "build_collective_timeout",
    "build_folder_callbacks",
    "build_labelled_sets",
    "build_load_path",
    "build_loggers",
    "build_model",
    "build_optimizer",
    "build_parallelism",
    "build_precision",
    "build_retrieval",
    "build_room_needs",
    "build_run_record",
    "build_scheduler",
    "build_train_loader",
    "epoch_size",
    "find_run_folder",
    "room_of_node",
    "shared_memory_of_node",
]

BuiltT = TypeVar("BuiltT")

# What a resume takes from the checkpoint or would silently mix with it.
FIXED_BY_A_CHECKPOINT = (
    "config.seed",
    "config.global_train_batch_size",
    "config.teacher.weights",
    "config.student",
    "config.prediction",
    "config.targets",
    "config.optimizer",
    "config.train_loader.shuffle",
    "config.train_loader.num_canonical_nodes",
    "config.train_loader.shuffle_block_size",
    "teacher.sha256",
)
# How much longer than two give up a shard, one after the other, a worker may bring nothing.
HANGING_SECONDS = 300
# How much longer a collective waits than a rank may wait for its images.
LATE_SECONDS = 60


def build_collective_timeout(config: TrainConfig) -> float:
    """Composer's time-out of a collective, or longer where a rank may wait longer for a store to bring its images."""
    loader = config.train_loader
    return COLLECTIVE_SECONDS if loader.remote is None else max(COLLECTIVE_SECONDS, loader.timeout + LATE_SECONDS)


def build_model(config: TrainConfig) -> DistillationModel:
    """Teacher and student as the sections ``teacher``, ``student``, ``prediction`` and ``targets`` say.

    Raises:
        InputError: The teacher's file cannot be used, or the student does not fit it.
    """
    with node_leaders_first("the teacher"):
        teacher = load_teacher(config.teacher.checkpoint, config.teacher.weights)
    top_k = config.targets.average_top_k_layers
    if top_k is not None and top_k > teacher.config.depth:
        raise InputError(
            f"targets.average_top_k_layers: must be at most the teacher's depth {teacher.config.depth}, got {top_k}"
        )
    if config.retrieval.pooling == "cls" and not teacher.num_extra_tokens and config.retrieval.datasets:
        raise InputError("retrieval.pooling: this teacher has no CLS token; allowed here: mean, mean_patches")
    try:
        student = teacher.build_student(**asdict(config.student))
    except ValueError as error:
        raise InputError(f"student: {error}") from error
    uses_fsdp = config.parallelism_config.fsdp is not None
    if not uses_fsdp:  # it casts what it gathers, and wants one dtype in a block
        teacher.cast_weights(getattr(torch, config.frozen_dtype or compute_dtype(config)))
    elif teacher.encoder.alibi_scale is not None:
        raise InputError("parallelism_config.fsdp: this teacher has learned ALiBi scales, which are not sharded")
    model = DistillationModel(
        teacher, student, config.prediction, config.targets.extra_tokens, top_k, cpu_bf16=trains_in_cpu_bf16(config)
    )
    if config.compile:
        compile_model(model, packs_weights=not torch.cuda.is_available() and not uses_fsdp)
    if config.activation_checkpointing:
        student.checkpoint_activations()
    return model


def trains_in_cpu_bf16(config: TrainConfig) -> bool:
    """Whether the model has to see to amp_bf16 itself: on a CPU the Trainer refuses it."""
    return config.precision == "amp_bf16" and not torch.cuda.is_available()


def build_precision(config: TrainConfig) -> str:
    """The Trainer's precision."""
    return "fp32" if trains_in_cpu_bf16(config) else config.precision


def build_train_loader(config: TrainConfig, image_size: int) -> DataLoader:
    """The section ``train_loader``: augmented uint8 images of this rank.

    An epoch is the largest whole number of global batches, the few samples left over being others in each epoch, so
    that it has the same batches on any number of ranks.

    Raises:
        InputError: The data cannot be used, or is smaller than a batch.
    """
    loader, global_batch_size, world_size = config.train_loader, config.global_train_batch_size, dist.get_world_size()
    local = Path(loader.local)
    with node_leaders_first("the data set's index"):
        if loader.remote is not None and dist.get_local_rank() == 0:  # the other ranks share its folder
            fetch_index(loader.remote, local)
    is_remote = loader.remote is not None
    shards = read_index(local, columns=(loader.column,), option="train_loader.column", shards_may_be_missing=is_remote)
    check_image_column(shards, loader.column, str(local))
    num_samples = sum(shard["samples"] for shard in shards)
    if num_samples < global_batch_size:
        raise InputError(
            f"{local}: has {num_samples} samples, fewer than one batch of global_train_batch_size {global_batch_size}"
        )
    if is_remote:
        check_room(build_room_needs(config, shards))
    raise_on_all_ranks(check_shared_memory(shared_memory_of_node(config, len(shards), num_samples, image_size)))
    try:
        dataset = StreamingImages(
            local=local,
            remote=loader.remote,
            batch_size=global_batch_size // world_size,
            transform=RandomResizedCropFlip(
                image_size,
                (loader.crop_scale[0], loader.crop_scale[1]),
                (loader.crop_ratio[0], loader.crop_ratio[1]),
                loader.flip,
            ),
            column=loader.column,
            seed=config.seed,
            shuffle=loader.shuffle,
            shuffle_block_size=loader.shuffle_block_size,
            num_canonical_nodes=loader.num_canonical_nodes,
            epoch_size=epoch_size(config, num_samples),
            cache_limit=loader.cache_limit,
            timeout=loader.timeout,
        )
    except (ShardError, ValueError) as error:  # cache_limit, which only the shards show to be too small
        raise InputError(f"train_loader: {reason(error)}") from error
    has_workers = loader.num_workers > 0
    return DataLoader(
        dataset,
        batch_size=dataset.batch_size,
        num_workers=loader.num_workers,
        prefetch_factor=loader.prefetch_factor if has_workers else None,
        persistent_workers=has_workers,
        multiprocessing_context=FORK if has_workers else None,
        # After the worker's own error, which names the shard; this one is for a worker that hangs.
        timeout=2 * loader.timeout + HANGING_SECONDS if has_workers else 0,
        pin_memory=torch.cuda.is_available(),
    )


def epoch_size(config: TrainConfig, num_samples: int) -> int:
    """The samples of the largest whole number of global batches."""
    return num_samples // config.global_train_batch_size * config.global_train_batch_size


def room_of_node(config: TrainConfig, shards: list[dict[str, Any]], node: int, num_nodes: int) -> RoomNeeded:
    """The room that a node, this one, still needs for the shards that it will read."""
    loader = config.train_loader
    shard_sizes = np.array([shard["samples"] for shard in shards])
    share = Share(node, num_nodes, loader.num_canonical_nodes, config.seed if loader.shuffle else None)
    read = shards_of_node(shard_sizes, epoch_size(config, int(shard_sizes.sum())), share)
    return room_needed(shards, Path(loader.local), bytes_to_int(loader.cache_limit or 0), read)


def build_room_needs(config: TrainConfig, shards: list[dict[str, Any]]) -> list[RoomNeeded]:
    """The room that each node still needs; the same list on every rank."""
    num_nodes = dist.get_world_size() // dist.get_local_world_size()
    need = room_of_node(config, shards, dist.get_node_rank(), num_nodes)
    needs = gather_objects((dist.get_local_rank(), need))
    return [need for local_rank, need in needs if local_rank == 0]


def shared_memory_of_node(config: TrainConfig, num_shards: int, num_samples: int, image_size: int) -> int:
    """The bytes of shared memory that the ranks of a node need for their data."""
    loader, ranks = config.train_loader, dist.get_local_world_size()
    batch_bytes = config.global_train_batch_size // dist.get_world_size() * 3 * image_size**2
    return shared_memory_needed(num_shards, num_samples, ranks, loader.num_workers, loader.prefetch_factor, batch_bytes)


def build_optimizer(config: OptimizerConfig, model: torch.nn.Module) -> torch.optim.AdamW:
    """torch's AdamW on what trains; no weight decay on biases and norms."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def build_scheduler(config: TrainConfig, batches_per_epoch: int) -> CosineAnnealingWithWarmupScheduler:
    """Linear warm-up, then cosine to ``alpha_f`` of the learning rate at the run's end.

    Raises:
        InputError: The warm-up is longer than the run, which only the data's size shows where one is in epochs.
    """
    scheduler = config.scheduler
    warmup, duration = Time.from_timestring(scheduler.t_warmup), Time.from_timestring(config.max_duration)
    batches = {TimeUnit.BATCH: 1, TimeUnit.EPOCH: batches_per_epoch}
    if warmup.unit in batches and warmup.value * batches[warmup.unit] > duration.value * batches[duration.unit]:
        raise InputError(
            f"scheduler.t_warmup: must not be longer than max_duration {config.max_duration}, got {scheduler.t_warmup} "
            f"with {batches_per_epoch} batches an epoch"
        )
    return CosineAnnealingWithWarmupScheduler(t_warmup=scheduler.t_warmup, alpha_f=scheduler.alpha_f)


def build_algorithms(config: TrainConfig) -> list[Algorithm]:
    """The section ``algorithms``, and the gradient's norm for the log."""
    clipping = config.algorithms.gradient_clipping
    if clipping is None:
        return [GradientNorm()]
    return [GradientClipping(clipping_type="norm", clipping_threshold=clipping.clipping_threshold), GradientNorm()]


def build_parallelism(config: TrainConfig) -> ParallelismConfig | None:
    """The section ``parallelism_config``; checkpoints are whole all the same."""
    fsdp = config.parallelism_config.fsdp
    return None if fsdp is None else ParallelismConfig(fsdp2=FSDP2Config(state_dict_type="full", **asdict(fsdp)))


def build_folder_callbacks(config: TrainConfig) -> list[Callback]:
    """What sees to ``save_folder``, which is this run's alone from now on.

    Raises:
        InputError: Another run trains there.
    """
    folder = find_run_folder(config)
    if folder is None:
        return []
    return [
        SoleRun(folder.local, folder.address),
        CheckpointKeeping(folder.local, folder.prefix, config.save_num_checkpoints_to_keep),
    ]


def build_callbacks(config: TrainConfig) -> list[Callback]:
    """Those of the section ``callbacks``.

    Raises:
        InputError: One does not take an argument's value.
    """
    chosen = {name: arguments for name, arguments in config.callbacks.items() if arguments is not None}
    return [build_chosen("callbacks", name, CALLBACKS[name], arguments) for name, arguments in chosen.items()]


def build_chosen(section: str, name: str, chosen: Callable[..., BuiltT], arguments: dict[str, Any]) -> BuiltT:
    """One callback or logger; which arguments it takes has been checked, their values only it can."""
    try:
        return chosen(**arguments)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{section}.{name}: {reason(error)}") from error


def build_loggers(config: TrainConfig) -> list[LoggerDestination]:
    """The progress, and the section ``loggers``; JSON lines without a filename go to the run's folder, if any.

    Raises:
        InputError: One does not take an argument's value.
    """
    loggers: list[LoggerDestination] = [build_progress(config)]
    folder = find_run_folder(config)
    for name, arguments in config.loggers.items():
        if arguments is None:
            continue
        if name == "jsonl" and "filename" not in arguments:
            if folder is None:
                continue
            remote = None if folder.address is None else f"{folder.address}/log.jsonl"
            arguments = {"filename": str(folder.local / "log.jsonl"), "remote": remote} | arguments
        loggers.append(build_chosen("loggers", name, LOGGERS[name], arguments))
    if folder is not None and folder.address is not None:
        uploader = maybe_create_remote_uploader_downloader_from_uri(folder.address, loggers)
        assert uploader is not None  # there is no other one among ours
        if uploader.remote_backend_name == "s3":
            uploader.backend_kwargs["client_config"] = PATIENT_CLIENT
        loggers.append(uploader)
    return loggers


def build_progress(config: TrainConfig) -> Progress:
    """A bar on a terminal; plain lines in a log file or a pipe, or where they are asked for."""
    on_terminal = sys.stderr.isatty()
    prints_lines = config.log_to_console or (config.progress_bar and not on_terminal)
    return Progress(config.progress_bar and on_terminal, config.console_log_interval if prints_lines else None)


def build_retrieval(config: TrainConfig, model: DistillationModel) -> ZeroShotRetrieval | None:
    """The section ``retrieval``, or ``None`` where it has no data sets.

    Raises:
        InputError: A data set cannot be used.
    """
    retrieval, teacher = config.retrieval, model.teacher
    chosen = retrieval.datasets
    if not any(labelled is not None for labelled in chosen.values()):
        return None
    with node_leaders_first("the data sets for retrieval"):
        datasets = build_labelled_sets(chosen, teacher.config.image_size)
    if retrieval.max_images is not None:
        datasets = {name: labelled.at_most(retrieval.max_images) for name, labelled in datasets.items()}
    try:
        return ZeroShotRetrieval(
            datasets,
            retrieval.interval,
            retrieval.ks,
            headline=f"{retrieval.representation}_{retrieval.pooling}",
            references=build_references(retrieval.references, model),
            at_start=retrieval.at_start,
            device_batch_size=config.device_eval_batch_size,
            progress_bar=config.progress_bar,
        )
    except ValueError as error:
        raise InputError(f"retrieval: {error}") from error


def build_labelled_sets(chosen: dict[str, LabelledSetConfig | None], image_size: int) -> dict[str, LabelledSet]:
    """The data sets of a section ``datasets``, but those that are off.

    Raises:
        InputError: One cannot be used.
    """
    return {
        name: load_labelled_set(**asdict(labelled), image_size=image_size)
        for name, labelled in chosen.items()
        if labelled is not None
    }


def build_candidates(config: EvaluateConfig, device: str) -> tuple[list[Candidate], int]:
    """The model of ``recipes/evaluate.py``, and what it is compared with: pixels, encoder, untrained student, teacher.

    Returns:
        The candidates on the device, in eval mode, and their image size.

    Raises:
        InputError: A file cannot be used, or the model has no such embedding.
    """
    student, teacher = load_any(config.model, config.weights, config.teacher)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if student is not None:
            untrained = Student(student.encoder, student.config)
        else:
            assert teacher is not None  # load_any gives one of them
            untrained = teacher.build_student()
    encoder = untrained.encoder
    if config.pooling == "cls" and not untrained.num_extra_tokens:
        raise InputError("pooling: this model has no CLS token; allowed here: mean, mean_patches")
    transformers = {"untrained student": untrained, "student": student, "teacher": teacher}
    candidates = [
        Candidate("pixels", partial(pixels, encoder), 0, 0.0),
        Candidate(
            "encoder",
            partial(embed_with_encoder, encoder),
            sum(parameter.numel() for parameter in encoder.parameters()),
            2e-9 * encoder.forward_macs(),
        ),
    ]
    for name, transformer in transformers.items():
        if transformer is not None:
            size = sum(parameter.numel() for parameter in transformer.parameters())
            gflop = 2e-9 * (encoder.forward_macs() + transformer.forward_macs())
            candidates.append(Candidate(name, transformer.eval().to(device).embed_all, size, gflop))
    return candidates, encoder.config.image_size


def build_references(names: list[str], model: DistillationModel) -> dict[str, Embed]:
    """What the student is compared with: raw pixels, the frozen encoder alone, the teacher."""
    encoder = model.teacher.encoder
    known: dict[str, Embed] = {
        "pixels": partial(pixels, encoder),
        "encoder": model.in_precision(partial(embed_with_encoder, encoder)),
        **model.retrieval_references(),
    }
    return {name: known[name] for name in names}


def build_run_record(config: TrainConfig, teacher: Data2Vec2) -> RunRecord:
    """What the run was made of, for its folder and its checkpoints; its data set's index is at ``local`` by now."""
    loader = config.train_loader
    shards = read_index(Path(loader.local), columns=(), shards_may_be_missing=True)
    record = {
        "config": without_secrets(asdict(config)),
        "command": shlex.join(map(hide_secrets, sys.argv)),
        "teacher": teacher.provenance,
        "data": {"location": loader.remote or loader.local, **describe_data(shards)},
        "versions": package_versions(*OUR_PACKAGES),
        "hardware": {**describe_machine(), "ranks": dist.get_world_size()},
    }
    folder = find_run_folder(config)
    local, prefix = (None, None) if folder is None else (folder.local, folder.prefix)
    return RunRecord(record, local, prefix, FIXED_BY_A_CHECKPOINT)


def without_secrets(value: Any) -> Any:
    """A config's values, with addresses that give access to nothing."""
    if isinstance(value, dict):
        return {name: without_secrets(each) for name, each in value.items()}
    if isinstance(value, list):
        return [without_secrets(each) for each in value]
    return hide_secrets(value) if isinstance(value, str) else value


def build_load_path(config: TrainConfig) -> str | None:
    """The checkpoint that the Trainer is to load: the run's own newest one, or else that of ``load_path``.

    The first node chooses, and all take the same; whichever it is was looked through beforehand.

    Raises:
        InputError: It is not whole, was not written by ``recipes/train.py``, or cannot be read.
    """
    folder, load_path = find_run_folder(config), config.load_path
    newest = None
    if config.autoresume and folder is not None:
        chosen: list[str | None] = [None]
        with rank_zero_first("the newest checkpoint"):
            if dist.get_global_rank() == 0:
                found = find_newest_checkpoint(folder.local, folder.address)
                chosen = [None if found is None else found.name]
        dist.broadcast_object_list(chosen)
        newest = chosen[0]
    is_remote = load_path is not None and Address.parse(load_path).is_remote
    path = None if load_path is None else fetched_path(load_path) if is_remote else Path(load_path)
    with node_leaders_first("the checkpoint"):
        is_first = dist.get_local_rank() == 0
        if newest is not None:
            assert folder is not None  # there was one to look in
            path = folder.local / newest
            if is_first and dist.get_global_rank() != 0:  # the first node has it, and has read all of it
                bring_checkpoint(newest, folder.local, folder.address)
        elif is_first and load_path is not None and path is not None:
            if is_remote:
                fetch_checkpoint(load_path, path)
            check_checkpoint(path)
    return None if path is None else str(path)


def fetched_path(load_path: str) -> Path:
    """Where a remote checkpoint is kept on this machine.

    Raises:
        InputError: Composer would look elsewhere.
    """
    path = cache_folder() / "checkpoints" / f"{hashlib.sha256(load_path.encode()).hexdigest()[:16]}.pt"
    try:
        check_path(str(path))
    except ValueError as error:
        raise InputError(f"TORCH_HOME: {error}") from error
    return path


def find_run_folder(config: TrainConfig) -> RunFolder | None:
    """Where the run's files are; ``None`` where nothing is saved."""
    return None if config.save_folder is None else RunFolder.parse(config.save_folder)
