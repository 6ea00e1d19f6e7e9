"""Checks of a config that concern several fields at once, or names behind the fields; any machine can make them."""

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from d2v_composer.config.evaluate import EvaluateConfig
from d2v_composer.config.finetune import FinetuneConfig
from d2v_composer.config.limits import suggest
from d2v_composer.config.schema import (
    LoaderConfig,
    ModelConfig,
    RunConfig,
    ShardLoaderConfig,
    TeacherConfig,
    TrainConfig,
    TrainerConfig,
)
from d2v_composer.models.names import DATA2VEC2
from d2v_composer.models.precision import choose_precision
from d2v_composer.models.timm_config import PREFIX
from d2v_composer.system.addresses import Address

__all__ = ["describe_long_warmup", "find_contradictions", "find_wrong_arguments"]

# Composer divides by these arguments without a check.
DIVISORS = ("batch_log_interval", "flush_interval", "log_duplicated_metric_every_n_steps", "window_size")


def find_contradictions(config: RunConfig) -> Iterator[str]:
    """Yield a line for each value that does not go with another one; each alone is within its limits."""
    if isinstance(config, ModelConfig):
        yield from _model(config)
    if isinstance(config, EvaluateConfig):
        yield from _evaluation(config)
    if isinstance(config, TrainerConfig):
        yield from _warmup(config)
        yield from _log_address(config)
    if isinstance(config, TrainConfig):
        yield from _teacher(config.teacher)
        yield from _batches(config.global_train_batch_size, config.train_loader)
        yield from _precision(config)
    if isinstance(config, FinetuneConfig):
        yield from _finetuning(config)


def find_wrong_arguments(config: RunConfig) -> Iterator[str]:
    """Yield a line for each callback or logger that does not exist, and for each of their arguments that is wrong."""
    if isinstance(config, TrainerConfig):
        from d2v_composer.callbacks.yaml_names import CALLBACKS, LOGGERS  # Composer's, which takes seconds to import

        yield from _arguments("callbacks", CALLBACKS, config.callbacks)
        yield from _arguments("loggers", LOGGERS, config.loggers)


def _teacher(teacher: TeacherConfig) -> Iterator[str]:
    if teacher.model == DATA2VEC2:
        if teacher.checkpoint is None:
            yield "teacher.checkpoint: must not be null for data2vec2; only timm has pretrained weights to fetch"
        if teacher.image_size is not None:
            yield f"teacher.image_size: must be null for data2vec2, whose file fixes it, got {teacher.image_size}"
    elif teacher.weights != "model":
        yield f"teacher.weights: must be model for {teacher.model}, got {teacher.weights}"


def _model(config: ModelConfig) -> Iterator[str]:
    if not config.model.startswith(PREFIX):
        for name in ("checkpoint", "first_blocks", "image_size"):
            if (value := getattr(config, name)) is not None:
                yield f"{name}: must be null unless the model is timm/NAME, got {value}"


def _evaluation(config: EvaluateConfig) -> Iterator[str]:
    if not any(config.datasets.values()):
        yield (
            "datasets: must have at least one data set that is not null, such as "
            "'datasets={cifar10: {format: cifar10, root: datasets, download: true}}'"
        )


def _finetuning(config: FinetuneConfig) -> Iterator[str]:
    if config.dataset is None:
        yield "dataset: is required, such as 'dataset={format: cifar10, root: datasets, download: true}'"
    if config.from_scratch and not config.train_encoder:
        yield "from_scratch: needs train_encoder=true: a frozen encoder would keep its random weights"
    loader = config.train_loader
    if loader.stream:
        if config.dataset is not None and config.dataset.format != "mds":
            yield f"train_loader.stream: must be false unless dataset.format is mds, got {config.dataset.format}"
        yield from _batches(config.global_train_batch_size, loader)
    else:
        of_any_loader, default = {each.name for each in fields(LoaderConfig)}, ShardLoaderConfig()
        for name in (each.name for each in fields(ShardLoaderConfig)):
            if name not in of_any_loader and getattr(loader, name) != getattr(default, name):
                yield f"train_loader.{name}: needs train_loader.stream=true"
    if config.callbacks.get("health") is not None:
        yield "callbacks.health: must be null in a fine-tuning: it compares predictions with a teacher's targets"
    if config.algorithms.mixup is not None and config.algorithms.cutmix is not None:
        yield "algorithms.cutmix: Composer cannot mix labels twice: mixup or cutmix must be null"


def _batches(batch_size: int, loader: ShardLoaderConfig) -> Iterator[str]:
    parts = loader.num_canonical_nodes
    if batch_size % parts:
        yield f"train_loader.num_canonical_nodes: must divide global_train_batch_size {batch_size}, got {parts}"


def _warmup(config: TrainerConfig) -> Iterator[str]:
    from composer.core import Time  # takes seconds

    warmup, duration = map(Time.from_timestring, (config.scheduler.t_warmup, config.max_duration))
    if warmup.unit == duration.unit and warmup > duration:
        yield describe_long_warmup(config)


def describe_long_warmup(config: TrainerConfig, why: str = "") -> str:
    """Return the line for a warm-up that is longer than the run.

    Args:
        config: The run's.
        why: Follows the value.
    """
    return (
        f"scheduler.t_warmup: must not be longer than max_duration {config.max_duration}, "
        f"got {config.scheduler.t_warmup}{why}; scheduler.t_warmup=0.1dur is a tenth of any run"
    )


def _precision(config: TrainConfig) -> Iterator[str]:
    with_fsdp = config.parallelism_config.fsdp is not None
    computed = str(choose_precision(config.precision).dtype).removeprefix("torch.")
    allowed = ["float32"] if with_fsdp or computed == "float32" else ["float32", computed]
    if config.frozen_dtype not in (None, *allowed):
        why = "FSDP, which casts what it gathers" if with_fsdp else f"precision {config.precision}"
        yield f"frozen_dtype: must be {' or '.join(allowed)} with {why}, got {config.frozen_dtype}"
    if with_fsdp and config.device_train_microbatch_size == "auto":
        yield "device_train_microbatch_size: Composer has no 'auto' with FSDP; give a number or null"


def _arguments(section: str, known: Mapping[str, type], chosen: Mapping[str, Any]) -> Iterator[str]:
    """Compare the chosen callbacks or loggers, and their arguments, with those that exist."""
    for name, arguments in chosen.items():
        if name not in known:
            yield f"{section}.{name}: no such name{suggest(name, list(known))}"
        elif arguments is not None and not isinstance(arguments, dict):
            yield f"{section}.{name}: must be arguments by name, {{}} for none or null for off, got {arguments!r}"
        elif arguments is not None:
            parameters = inspect.signature(known[name]).parameters.values()
            allowed = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
            for argument, value in arguments.items():
                key = f"{section}.{name}.{argument}"
                if argument not in allowed:
                    yield f"{key}: no such argument{suggest(argument, allowed)}"
                elif argument in DIVISORS and (not isinstance(value, int) or value < 1):
                    yield f"{key}: must be a number of at least 1, got {value!r}"
                elif not _is_finite(value):
                    yield f"{key}: must be finite, got {value}"


def _is_finite(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


def _log_address(config: TrainerConfig) -> Iterator[str]:
    """Check that the log is uploaded to the bucket of the checkpoints: the run has no other uploader."""
    arguments = config.loggers.get("jsonl")
    remote = arguments.get("remote") if isinstance(arguments, dict) else None
    if remote is None:
        return
    saved = Address.parse(config.save_folder or "")
    try:
        log = Address.parse(str(remote))
    except ValueError as error:
        yield f"loggers.jsonl.remote: {error}"
        return
    if not saved.is_remote or not log.path or (log.scheme, log.bucket) != (saved.scheme, saved.bucket):
        where = "a file in save_folder's bucket" if saved.is_remote else "null"
        yield f"loggers.jsonl.remote: must be {where} with save_folder {config.save_folder}, got {remote!r}"
