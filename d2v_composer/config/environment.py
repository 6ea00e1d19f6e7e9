"""Checks of what a config needs of this machine: GPU, compiler, ranks, packages, files."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from composer.utils import dist

from d2v_composer.callbacks.yaml_names import LOGGERS
from d2v_composer.config.schema import RunConfig, TrainConfig
from d2v_composer.models.compilation import find_missing
from d2v_composer.system.addresses import Address

__all__ = ["find_unmet_needs"]


def find_unmet_needs(config: RunConfig) -> Iterator[str]:
    """Yield a line for each field that this machine cannot fulfil."""
    if not torch.cuda.is_available():
        yield from needs_of_a_gpu(config)
    if not isinstance(config, TrainConfig):
        return
    if config.compile and (missing := find_missing()) is not None:
        yield f"compile: {missing}; install it, or compile=false"
    if config.global_train_batch_size % (num_ranks := dist.get_world_size()):
        yield f"global_train_batch_size: must divide by the {num_ranks} ranks, got {config.global_train_batch_size}"
    loader = config.train_loader
    if loader.remote is None and not Path(loader.local).is_dir():
        yield f"train_loader.local: {loader.local}: no such folder"
    if (path := config.load_path) is not None and not Address.parse(path).is_remote and not Path(path).is_file():
        yield f"load_path: {path}: {'is a folder, not a file' if Path(path).is_dir() else 'no such file'}"
    for name, arguments in config.loggers.items():
        if arguments is not None and name in LOGGERS and name != "jsonl" and find_spec(name) is None:
            yield f"loggers.{name}: needs the package {name}: pip install {name}"


def needs_of_a_gpu(config: RunConfig) -> Iterator[str]:
    """Yield a line for each field that needs a GPU."""
    if config.precision == "amp_fp16":
        yield "precision: amp_fp16 needs a GPU, and this machine has none; on a CPU: precision=fp32 or amp_bf16"
    if not isinstance(config, TrainConfig):
        return
    if config.device_train_microbatch_size == "auto":
        yield "device_train_microbatch_size: 'auto' needs a GPU, and this machine has none; give a number or null"
    if config.parallelism_config.fsdp is not None:
        yield "parallelism_config.fsdp: needs GPUs: between CPUs torch adds gradients instead of averaging them"
