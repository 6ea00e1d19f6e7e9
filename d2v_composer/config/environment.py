"""Checks of what a config needs of this machine: GPU, compiler, ranks, packages, files; none uses the network."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import torch

from d2v_composer.checkpoints.pointer import LATEST
from d2v_composer.config.evaluate import EvaluateConfig
from d2v_composer.config.finetune import FinetuneConfig
from d2v_composer.config.packages import needs_of_loggers
from d2v_composer.config.schema import (
    LabelledSetConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    TrainerConfig,
    TrainLoaderConfig,
)
from d2v_composer.data.labelled_sets import find_missing_files
from d2v_composer.data.mds_index import find_missing_index
from d2v_composer.models.compiler import find_missing
from d2v_composer.models.timm_config import PREFIX
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.atomic_files import find_unwritable
from d2v_composer.system.fetch import find_missing_file
from d2v_composer.system.launched_rank import is_one_node, num_ranks

__all__ = ["find_unmet_needs"]


def find_unmet_needs(config: RunConfig) -> Iterator[str]:
    """Yield a line for each field that this machine cannot fulfil. Values may be outside their limits."""
    if not torch.cuda.is_available():
        yield from needs_of_a_gpu(config)
    if isinstance(config, TrainerConfig):
        yield from needs_of_training(config)
        # Of several nodes, one may lack a file: the builders tell all, once they have joined. Here, others would wait.
        if is_one_node():
            yield from needs_of_files(config)
        yield from needs_of_loggers(config.loggers)
    elif isinstance(config, EvaluateConfig):
        yield from needs_of_an_evaluation(config)


def needs_of_a_gpu(config: RunConfig) -> Iterator[str]:
    """Yield a line for each field that needs a GPU."""
    if config.precision == "amp_fp16":
        yield "precision: amp_fp16 needs a GPU, and this machine has none; on a CPU: precision=fp32 or amp_bf16 or auto"
    if isinstance(config, TrainerConfig) and config.device_train_microbatch_size == "auto":
        yield "device_train_microbatch_size: 'auto' needs a GPU, and this machine has none; give a number or null"
    if isinstance(config, TrainConfig) and config.parallelism_config.fsdp is not None:
        yield "parallelism_config.fsdp: needs GPUs: between CPUs torch adds gradients instead of averaging them"


def needs_of_training(config: TrainerConfig) -> Iterator[str]:
    """Yield a line for each field whose compiler or ranks are missing."""
    if isinstance(config, TrainConfig) and config.compile and (missing := find_missing()) is not None:
        yield f"compile: {missing}; install it, or compile=false"
    if config.global_train_batch_size % (ranks := num_ranks()):
        yield f"global_train_batch_size: must divide by the {ranks} ranks, got {config.global_train_batch_size}"


def needs_of_files(config: TrainerConfig) -> Iterator[str]:
    """Yield a line for each field whose files are missing or cannot be written."""
    if isinstance(config, TrainConfig):
        checkpoint = config.teacher.checkpoint
        if checkpoint is not None and (missing := find_missing_file(checkpoint)) is not None:
            yield f"teacher.checkpoint: {config.teacher.checkpoint}: {missing}"
        yield from needs_of_training_images(config.train_loader)
        yield from needs_of_labelled_sets("retrieval.datasets.", config.retrieval.datasets)
    if isinstance(config, FinetuneConfig):
        yield from needs_of_model(config)
        if config.train_loader.remote is not None and config.dataset is not None and config.dataset.format == "mds":
            yield from needs_of_remote_set(Path(config.dataset.root))
        else:
            yield from needs_of_labelled_sets("", {"dataset": config.dataset})
    with suppress(ValueError):  # a malformed save_folder, which find_wrong_values names
        local = config.save_folder and RunFolder.parse(config.save_folder).local
        if local and (fault := find_unwritable(local)) is not None:
            yield f"save_folder: {local}: {fault}"
    if config.load_path is not None and (missing := find_missing_file(config.load_path)) is not None:
        yield f"load_path: {config.load_path}: {missing}"


def needs_of_training_images(loader: TrainLoaderConfig) -> Iterator[str]:
    """Yield a line if the data set is not there, or the cache of a remote one cannot be written."""
    if loader.remote is not None:
        if (fault := find_unwritable(Path(loader.local))) is not None:
            yield f"train_loader.local: {loader.local}: {fault}"
    elif (missing := find_missing_index(Path(loader.local))) is not None:
        yield f"train_loader.local: {loader.local}: {missing}; or set train_loader.remote to an address"


def needs_of_remote_set(root: Path) -> Iterator[str]:
    """Yield a line if the cache of remote train images cannot be written, or the test images are not there."""
    if (fault := find_unwritable(root / "train")) is not None:
        yield f"dataset.root: {root / 'train'}: {fault}"
    if (missing := find_missing_index(root / "test")) is not None:
        yield f"dataset.root: {root / 'test'}: {missing}"


def needs_of_labelled_sets(prefix: str, chosen: Mapping[str, LabelledSetConfig | None]) -> Iterator[str]:
    """Yield a line for each labelled set that is not there, and will not be downloaded."""
    for name, labelled in chosen.items():
        if labelled is not None:
            missing = find_missing_files(labelled.format, Path(labelled.root), labelled.download)
            if missing is not None:
                yield f"{prefix}{name}.root: {missing}"


def find_missing_model(name: str) -> str | None:
    """Return why a model is not there, or ``None``; timm's pretrained ones are on the hub."""
    return None if name.startswith(PREFIX) else find_missing_file(name)


def needs_of_model(config: ModelConfig) -> Iterator[str]:
    """Yield a line for each file of a model and its teacher that is missing."""
    # A run that saves a checkpoint removes its pointer for a moment.
    is_latest = Path(config.model).name == LATEST
    if not is_latest and (missing := find_missing_model(config.model)) is not None:
        yield f"model: {config.model}: {missing}"
    if config.teacher is not None and (missing := find_missing_model(config.teacher)) is not None:
        yield f"teacher: {config.teacher}: {missing}"
    if config.checkpoint is not None and (missing := find_missing_file(config.checkpoint)) is not None:
        yield f"checkpoint: {config.checkpoint}: {missing}"


def needs_of_an_evaluation(config: EvaluateConfig) -> Iterator[str]:
    """Yield a line for each field whose files are missing or cannot be written."""
    yield from needs_of_model(config)
    yield from needs_of_labelled_sets("datasets.", config.datasets)
    if config.out is not None and (fault := find_unwritable(Path(config.out))) is not None:
        yield f"out: {config.out}: {fault}"
