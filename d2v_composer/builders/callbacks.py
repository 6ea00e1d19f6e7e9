"""Build callbacks, loggers and the record of the run."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from composer.core import Callback
from composer.loggers import LoggerDestination
from composer.utils import dist, maybe_create_remote_uploader_downloader_from_uri

from d2v_composer.builders.run_folder import find_run_folder
from d2v_composer.callbacks import CheckpointRetention, ProgressLogger, RunFolderLock, RunRecord
from d2v_composer.callbacks.checkpoint_retention import PATIENT_CLIENT
from d2v_composer.callbacks.yaml_names import CALLBACKS, LOGGERS
from d2v_composer.config.schema import TrainConfig
from d2v_composer.data.mds_index import describe_data, read_index
from d2v_composer.models.data2vec2 import Data2Vec2
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError
from d2v_composer.system.machine_info import OUR_PACKAGES, describe_machine, package_versions
from d2v_composer.system.retry import reason

__all__ = [
    "FIXED_BY_A_CHECKPOINT",
    "BuiltT",
    "build_callbacks",
    "build_chosen",
    "build_folder_callbacks",
    "build_loggers",
    "build_progress",
    "build_run_record",
    "without_secrets",
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


def build_folder_callbacks(config: TrainConfig) -> list[Callback]:
    """What sees to ``save_folder``, which is this run's alone from now on.

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


def build_progress(config: TrainConfig) -> ProgressLogger:
    """A bar on a terminal; plain lines in a log file or a pipe, or where they are asked for."""
    on_terminal = sys.stderr.isatty()
    prints_lines = config.log_to_console or (config.progress_bar and not on_terminal)
    return ProgressLogger(config.progress_bar and on_terminal, config.console_log_interval if prints_lines else None)


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
