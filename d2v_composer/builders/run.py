"""Build a whole training run from its config: the entry of this package for recipes/train.py."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from composer.core import Callback

from d2v_composer.builders.data import build_train_loader, read_train_index
from d2v_composer.builders.loggers import ask_logging_servers, build_loggers, draw_for
from d2v_composer.builders.models import build_model
from d2v_composer.builders.run_folder import build_load_path, check_record
from d2v_composer.builders.training import (
    build_algorithms,
    build_callbacks,
    build_folder_callbacks,
    build_graceful_stop,
    build_optimizer,
    build_parallelism,
    build_retrieval,
    build_run_record,
    build_scheduler,
)
from d2v_composer.callbacks import NanGuard, RunRecord, Throughput, ZeroShotRetrieval
from d2v_composer.checkpoints.resume import drop_unused_scaler
from d2v_composer.config.schema import TrainConfig, TrainerConfig
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.execution import choose_precision


class BuiltRun(NamedTuple):
    """A run that is ready to train."""

    trainer_arguments: dict[str, Any]
    """Arguments of Composer's Trainer."""
    model: DistillationModel
    record: RunRecord
    retrieval: ZeroShotRetrieval | None


def build_run(config: TrainConfig) -> BuiltRun:
    """Build everything that a run needs, and lock its folder.

    Call it on every rank, after they have joined.

    Raises:
        InputError: A file, data set or setting cannot be used.
    """
    ask_logging_servers(config)
    model = build_model(config)
    shards = read_train_index(config)
    sizes = model.teacher.config
    train_loader = build_train_loader(config, shards, sizes.image_size, sizes.interpolation)
    scheduler = build_scheduler(config, len(train_loader))
    retrieval = build_retrieval(config, model)
    record = build_run_record(config, model.teacher, shards)
    arguments = {
        "model": model,
        "train_dataloader": train_loader,
        "optimizers": build_optimizer(config.optimizer, model),
        "schedulers": scheduler,
        "algorithms": build_algorithms(config.algorithms),
        "parallelism_config": build_parallelism(config),
        **build_trainer_arguments(config, record, [] if retrieval is None else [retrieval]),
    }
    if retrieval is not None:
        retrieval.draw = draw_for(arguments["loggers"])
    return BuiltRun(arguments, model, record, retrieval)


def build_trainer_arguments(config: TrainerConfig, record: RunRecord, others: Sequence[Callback]) -> dict[str, Any]:
    """Build the Trainer's arguments that do not depend on the model and its data, and lock the run's folder.

    Args:
        config: The run's.
        record: Its record.
        others: Further callbacks.

    Raises:
        InputError: The folder is in use, or its checkpoint is another run's; or a callback or logger cannot be used.
    """
    chosen_callbacks = build_callbacks(config)
    # First lock the folder, then select the checkpoint in it: another run could still write one.
    folder_callbacks = build_folder_callbacks(config)
    load_path = build_load_path(config)
    if load_path is not None:
        check_record(load_path, record)
    graceful_stop = build_graceful_stop(config)
    save_interval = graceful_stop.save_interval
    callbacks: list[Callback] = [*folder_callbacks, record, Throughput(), NanGuard(save_interval), graceful_stop]
    return {
        "max_duration": config.max_duration,
        "callbacks": [*callbacks, *others, *chosen_callbacks],
        "loggers": build_loggers(config),
        "progress_bar": False,  # ours is among the loggers
        "precision": choose_precision(config.precision).trainer,
        "device_train_microbatch_size": config.device_train_microbatch_size,
        "seed": config.seed,
        "run_name": config.run_name,
        "save_folder": config.save_folder,
        "save_interval": save_interval,
        "save_num_checkpoints_to_keep": -1,  # CheckpointRetention removes old ones
        "save_overwrite": True,  # a kill may leave a truncated checkpoint, which the restart overwrites
        "load_path": load_path,  # instead of Composer's autoresume
        "load_ignore_keys": partial(drop_unused_scaler, precision=config.precision),
    }
