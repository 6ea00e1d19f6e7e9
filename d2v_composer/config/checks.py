"""Check the values of a config whose names and types are right."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from composer.core import Time, TimeUnit
from composer.utils import dist
from streaming.base.util import bytes_to_int

from d2v_composer.callbacks.yaml_names import CALLBACKS, LOGGERS
from d2v_composer.config.schema import EvaluateConfig, RetrievalConfig, TrainConfig
from d2v_composer.models.compilation import find_missing
from d2v_composer.system.addresses import Address, RunFolder, check_path, check_run_name

__all__ = [
    "EVERY_SO_MANY",
    "LARGEST_FLOAT",
    "LARGEST_INT",
    "NO_FP16",
    "SMALLEST_FLOAT",
    "WEEK",
    "compute_dtype",
    "flatten",
    "problems",
    "suggestion",
]

# What Composer's own divide by, and do not look at.
EVERY_SO_MANY = ("batch_log_interval", "flush_interval", "log_duplicated_metric_every_n_steps", "window_size")

NO_FP16 = "precision: amp_fp16 needs a GPU, and this machine has none; on a CPU: precision=fp32 or amp_bf16"

# For a seed as well: ranks and epochs add to it, and numpy's seeds end at 2^32.
LARGEST_INT = (1 << 31) - 1

SMALLEST_FLOAT, LARGEST_FLOAT = 1e-30, 1e30  # float32's end at 1e-38 and 3e38

WEEK = 7 * 24 * 3600


def suggestion(name: str, allowed: Sequence[str]) -> str:
    """What to say after an unknown name."""
    nearest = difflib.get_close_matches(name, allowed, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"{hint} (allowed: {', '.join(allowed)})" if allowed else hint


def problems(config: TrainConfig) -> Iterator[str]:
    """What is wrong with the values of a config whose names and types are right, a line each."""
    yield from _numbers(config)
    yield from _pairs(config)
    yield from _batch_sizes(config)
    yield from _durations(config)
    yield from _devices(config)
    yield from _compilation(config)
    yield from _frozen_dtype(config)
    yield from _parallelism(config)
    yield from _retrieval(config.retrieval)
    for section, known in (("callbacks", CALLBACKS), ("loggers", LOGGERS)):
        yield from _arguments(section, known, getattr(config, section))
    yield from _data(config)
    yield from _addresses(config)
    yield from _log_address(config)


def _addresses(config: TrainConfig) -> Iterator[str]:
    """What Composer, Streaming or a store would read otherwise than it is written."""
    checks: dict[str, tuple[Callable[[str], Any], str | None]] = {
        "run_name": (check_run_name, config.run_name),
        "teacher.checkpoint": (Address.parse, config.teacher.checkpoint),
        "train_loader.remote": (Address.parse, config.train_loader.remote),
        "save_folder": (RunFolder.parse, config.save_folder),
        "load_path": (_check_load_path, config.load_path),
    }
    for key, (check, text) in checks.items():
        if text is not None:
            try:
                check(text)
            except ValueError as error:
                yield f"{key}: {error}"
    yield from _folders({"train_loader.local": config.train_loader.local, **_roots("retrieval.", config.retrieval)})


def _roots(section: str, config: RetrievalConfig | EvaluateConfig) -> dict[str, str]:
    """Key → root of every labelled set that is on."""
    chosen = config.datasets.items()
    return {f"{section}datasets.{name}.root": labelled.root for name, labelled in chosen if labelled is not None}


def _folders(folders: Mapping[str, str | None]) -> Iterator[str]:
    """Which folders are in a store, where they must be of this machine."""
    for key, folder in folders.items():
        if folder is not None and "://" in folder:
            yield f"{key}: must be a folder of this machine, got {folder!r}"


def _check_load_path(text: str) -> None:
    """Refuse a checkpoint that is not there, or that Composer would look for elsewhere.

    Raises:
        ValueError: It says what is allowed.
    """
    if Address.parse(text).is_remote:
        return
    check_path(text)
    if not Path(text).is_file():
        raise ValueError(f"{text}: {'is a folder, not a file' if Path(text).is_dir() else 'no such file'}")


def _magnitudes(config: TrainConfig | EvaluateConfig) -> Iterator[str]:
    """What is beyond the numbers that are computed with."""
    for key, value in flatten(asdict(config)):
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key}: must be finite, got {value}"
        elif key.startswith(("callbacks.", "loggers.")):
            continue  # any number may be meant, such as a GPU's FLOPs
        elif isinstance(value, float) and abs(value) > LARGEST_FLOAT:
            yield f"{key}: must be at most {LARGEST_FLOAT:g}, got {value:g}"
        elif isinstance(value, int) and abs(value) > LARGEST_INT and key != "train_loader.cache_limit":
            yield f"{key}: must be at most {LARGEST_INT}, got {value}"


def _numbers(config: TrainConfig) -> Iterator[str]:
    yield from _magnitudes(config)
    student, loader, optimizer = config.student, config.train_loader, config.optimizer
    at_least = {
        "seed": (config.seed, 0),
        "global_train_batch_size": (config.global_train_batch_size, 1),
        "device_eval_batch_size": (config.device_eval_batch_size, 1),
        "student.depth": (student.depth, 1),
        "student.num_heads": (student.num_heads, 1),
        "student.num_alibi_heads": (student.num_alibi_heads, 1),
        "targets.average_top_k_layers": (config.targets.average_top_k_layers, 1),
        "train_loader.num_workers": (loader.num_workers, 0),
        "train_loader.prefetch_factor": (loader.prefetch_factor, 1),
        "train_loader.timeout": (loader.timeout, 1),
        "train_loader.shuffle_block_size": (loader.shuffle_block_size, 1),
        "train_loader.num_canonical_nodes": (loader.num_canonical_nodes, 1),
        "optimizer.weight_decay": (optimizer.weight_decay, 0),
    }
    for key, (value, minimum) in at_least.items():
        if value is not None and value < minimum:
            yield f"{key}: must be at least {minimum}, got {value}"
    at_most = {
        "student.depth": (student.depth, 1000),
        "student.mlp_ratio": (student.mlp_ratio, 1000),
        "train_loader.num_workers": (loader.num_workers, 1000),
        "train_loader.prefetch_factor": (loader.prefetch_factor, 1000),
        "train_loader.timeout": (loader.timeout, WEEK),
    }
    for key, (value, maximum) in at_most.items():
        if value > maximum:
            yield f"{key}: must be at most {maximum}, got {value}"
    if config.save_num_checkpoints_to_keep < -1 or config.save_num_checkpoints_to_keep == 0:
        kept = config.save_num_checkpoints_to_keep
        yield f"save_num_checkpoints_to_keep: must be at least 1, or -1 for all, got {kept}"
    positive = {
        "student.mlp_ratio": student.mlp_ratio,
        "optimizer.lr": optimizer.lr,
        "optimizer.eps": optimizer.eps,
    }
    clipping = config.algorithms.gradient_clipping
    if clipping is not None:
        positive["algorithms.gradient_clipping.clipping_threshold"] = clipping.clipping_threshold
    for key, value in positive.items():
        if value <= 0:
            yield f"{key}: must be greater than 0, got {value}"
        elif value < SMALLEST_FLOAT:
            yield f"{key}: must be at least {SMALLEST_FLOAT:g}, got {value:g}"
    for key, value in {"scheduler.alpha_f": config.scheduler.alpha_f, "train_loader.flip": loader.flip}.items():
        if not 0 <= value <= 1:
            yield f"{key}: must be from 0 to 1, got {value}"


def _pairs(config: TrainConfig) -> Iterator[str]:
    loader, optimizer = config.train_loader, config.optimizer
    if len(optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in optimizer.betas):
        yield f"optimizer.betas: must be two numbers from 0 to below 1, got {optimizer.betas}"
    for key, pair in {"crop_scale": loader.crop_scale, "crop_ratio": loader.crop_ratio}.items():
        if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
            yield f"train_loader.{key}: must be two numbers, 0 < smallest <= largest, got {pair}"
    if loader.crop_scale[-1] > 1:
        yield f"train_loader.crop_scale: must be at most 1, got {loader.crop_scale}"


def _batch_sizes(config: TrainConfig) -> Iterator[str]:
    loader = config.train_loader
    if config.global_train_batch_size % loader.num_canonical_nodes:
        yield (
            f"train_loader.num_canonical_nodes: must divide global_train_batch_size {config.global_train_batch_size}, "
            f"got {loader.num_canonical_nodes}"
        )
    microbatch = config.device_train_microbatch_size
    if (isinstance(microbatch, int) and microbatch < 1) or (isinstance(microbatch, str) and microbatch != "auto"):
        yield f"device_train_microbatch_size: must be at least 1, 'auto' or null, got {microbatch!r}"


def _data(config: TrainConfig) -> Iterator[str]:
    loader, world_size = config.train_loader, dist.get_world_size()
    if config.global_train_batch_size % world_size:
        yield f"global_train_batch_size: must divide by the {world_size} ranks, got {config.global_train_batch_size}"
    if loader.remote is None and not Path(loader.local).is_dir():
        yield f"train_loader.local: {loader.local}: no such folder"
    try:
        bytes_to_int(loader.cache_limit or 0)
    except ValueError:
        yield f"train_loader.cache_limit: must be bytes or a size such as '100gb', got {loader.cache_limit!r}"


def _durations(config: TrainConfig) -> Iterator[str]:
    durations = {
        "max_duration": (config.max_duration, ("ba", "ep")),
        "scheduler.t_warmup": (config.scheduler.t_warmup, ("ba", "ep", "dur")),
        "retrieval.interval": (config.retrieval.interval, ("ba", "ep", "dur")),
        # Saved at an epoch's end, a resume would replay that epoch's order and shift every later one.
        "save_interval": (config.save_interval, ("ba",)),
        "console_log_interval": (config.console_log_interval, ("ba", "ep")),
    }
    times: dict[str, Time] = {}
    for key, (text, allowed) in durations.items():
        example = " or ".join(f"'{'0.1' if unit == 'dur' else 5}{unit}'" for unit in allowed)
        try:
            times[key] = Time.from_timestring(text)
        except (TypeError, ValueError):
            yield f"{key}: must be a duration such as {example}, got {text!r}"
            continue
        if times[key].unit.value not in allowed:
            yield f"{key}: must be a duration such as {example}, got {text!r}"
        elif times[key].value < (0 if key == "scheduler.t_warmup" else 1) and times[key].unit != TimeUnit.DURATION:
            yield f"{key}: must be positive, got {text!r}"
    warmup, duration = times.get("scheduler.t_warmup"), times.get("max_duration")
    if warmup is not None and duration is not None and warmup.unit == duration.unit and warmup > duration:
        yield f"scheduler.t_warmup: must not be longer than max_duration {config.max_duration}, got {warmup}"
    if warmup is not None and warmup.unit == TimeUnit.DURATION and not 0 <= warmup.value <= 1:
        yield f"scheduler.t_warmup: must be from 0dur to 1dur, got {config.scheduler.t_warmup!r}"


def _devices(config: TrainConfig) -> Iterator[str]:
    if torch.cuda.is_available():
        return
    if config.precision == "amp_fp16":
        yield NO_FP16
    if config.device_train_microbatch_size == "auto":
        yield "device_train_microbatch_size: 'auto' needs a GPU, and this machine has none; give a number or null"


def _compilation(config: TrainConfig) -> Iterator[str]:
    if config.compile and (missing := find_missing()) is not None:
        yield f"compile: {missing}; install it, or compile=false"


def _frozen_dtype(config: TrainConfig) -> Iterator[str]:
    allowed = ["float32"] if config.parallelism_config.fsdp is not None else ["float32", compute_dtype(config)]
    if config.frozen_dtype is not None and config.frozen_dtype not in allowed:
        names = " or ".join(dict.fromkeys(allowed))
        why = "with FSDP, which casts what it gathers" if len(allowed) == 1 else f"with precision {config.precision}"
        yield f"frozen_dtype: must be {names} {why}, got {config.frozen_dtype}"


def compute_dtype(config: TrainConfig | EvaluateConfig) -> str:
    """What linear layers compute in."""
    return {"fp32": "float32", "amp_fp16": "float16", "amp_bf16": "bfloat16"}[config.precision]


def _parallelism(config: TrainConfig) -> Iterator[str]:
    if config.parallelism_config.fsdp is None:
        return
    if not torch.cuda.is_available():
        yield "parallelism_config.fsdp: needs GPUs: between CPUs torch adds gradients up where they are to be averaged"
    if config.device_train_microbatch_size == "auto":
        yield "device_train_microbatch_size: Composer has no 'auto' with FSDP; give a number or null"


def _retrieval(config: RetrievalConfig) -> Iterator[str]:
    known = ["pixels", "encoder", "teacher"]
    for name in config.references:
        if name not in known:
            yield f"retrieval.references: no such reference {name!r}{suggestion(name, known)}"
    if not config.ks or min(config.ks) < 1:
        yield f"retrieval.ks: must be one or more numbers from 1, got {config.ks}"
    if config.max_images is not None and config.max_images < 1:
        yield f"retrieval.max_images: must be at least 1, got {config.max_images}"


def _arguments(section: str, known: Mapping[str, type], chosen: Mapping[str, Any]) -> Iterator[str]:
    """Whether every chosen callback or logger exists and takes the arguments it is given."""
    for name, arguments in chosen.items():
        if name not in known:
            yield f"{section}.{name}: no such name{suggestion(name, list(known))}"
        elif arguments is not None and not isinstance(arguments, dict):
            yield f"{section}.{name}: must be arguments by name, {{}} for none or null for off, got {arguments!r}"
        elif arguments is not None:
            parameters = inspect.signature(known[name]).parameters.values()
            allowed = [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]
            for argument, value in arguments.items():
                key = f"{section}.{name}.{argument}"
                if argument not in allowed:
                    yield f"{key}: no such argument{suggestion(argument, allowed)}"
                elif argument in EVERY_SO_MANY and (not isinstance(value, int) or value < 1):
                    yield f"{key}: must be a number of at least 1, got {value!r}"
            if section == "loggers" and name != "jsonl" and find_spec(name) is None:
                yield f"loggers.{name}: needs the package {name}: pip install {name}"


def _log_address(config: TrainConfig) -> Iterator[str]:
    """Whether the log of JSON lines goes where the checkpoints go: only there it can be uploaded."""
    arguments = config.loggers.get("jsonl")
    remote = arguments.get("remote") if isinstance(arguments, dict) else None
    if remote is None:
        return
    try:
        saved = None if config.save_folder is None else Address.parse(config.save_folder)
        log = Address.parse(str(remote))
    except ValueError as error:
        yield f"loggers.jsonl.remote: {error}"
        return
    if saved is None or not saved.is_remote or not log.path or (log.scheme, log.bucket) != (saved.scheme, saved.bucket):
        where = "a file in save_folder's bucket" if saved is not None and saved.is_remote else "null"
        yield f"loggers.jsonl.remote: must be {where} with save_folder {config.save_folder}, got {remote!r}"


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every leaf of nested dicts and lists."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(values, list):
        for i, value in enumerate(values):
            yield from flatten(value, f"{prefix}[{i}]")
    else:
        yield prefix, values
