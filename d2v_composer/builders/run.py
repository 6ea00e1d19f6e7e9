"""Build a whole training run from its config, for recipes/train.py."""

from functools import partial
from typing import Any, NamedTuple

from composer.core import Callback
from composer.models import ComposerModel

from d2v_composer.builders.data import build_train_loader, read_train_index
from d2v_composer.builders.distillation import build_model
from d2v_composer.builders.models import build_augmentation
from d2v_composer.builders.run_folder import build_load_path, check_resume
from d2v_composer.builders.training import (
    FIXED_BY_A_CHECKPOINT,
    build_algorithms,
    build_callbacks,
    build_loggers,
    build_optimizer,
    build_parallelism,
    build_retrieval,
    build_run_record,
    build_scheduler,
)
from d2v_composer.callbacks.checkpointing import Checkpoints, NanGuard
from d2v_composer.callbacks.logging import Throughput, Uploads
from d2v_composer.callbacks.run_record import RunRecord
from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval
from d2v_composer.checkpoints.resume import drop_unused_scaler
from d2v_composer.config.schema import TrainConfig, TrainerConfig
from d2v_composer.data.modalities import MODALITIES, modality_of
from d2v_composer.models.distillation import DistillationModel
from d2v_composer.models.execution import choose_precision


class BuiltRun(NamedTuple):
    """A run that is ready to train."""

    trainer_arguments: dict[str, Any]
    """Arguments of Composer's Trainer."""
    model: DistillationModel
    retrieval: ZeroShotRetrieval | None
    header: dict[str, str]
    """Lines at the top of the run's log."""


def build_run(config: TrainConfig) -> BuiltRun:
    """Build everything that a run needs, and lock its folder.

    Call it on every rank, after they have joined.

    Raises:
        InputError: A file, data set or setting cannot be used.
    """
    model = build_model(config)
    modality, loader = modality_of(model.teacher.config), config.train_loader
    index = read_train_index(loader, modality, config.global_train_batch_size)
    transform = build_augmentation(loader, model.teacher.config, config.seed).transform
    sizes = config.global_train_batch_size, config.seed
    train_loader = build_train_loader(loader, index, transform, *sizes, is_compiled=config.compile is not False)
    retrieval = build_retrieval(config, model)
    data = {"modality": modality.name, "location": loader.remote or loader.local, **index.describe()}
    record = build_run_record(config, FIXED_BY_A_CHECKPOINT, teacher=model.teacher.provenance, data=data)
    arguments = {
        "train_dataloader": train_loader,
        "optimizers": build_optimizer(config.optimizer, model),
        "schedulers": build_scheduler(config, len(train_loader)),
        "algorithms": build_algorithms(config.algorithms),
        "parallelism_config": build_parallelism(config),
        **build_trainer_arguments(config, model, record, [] if retrieval is None else [retrieval]),
    }
    header = {modality.unit: f"{data['samples']:,} in {data['location']}"}
    if retrieval is not None:
        sets = ", ".join(retrieval.datasets)
        header["retrieval"] = f"{sets} every {config.retrieval.interval}, primary embedding {retrieval.primary}"
    return BuiltRun(arguments, model, retrieval, header)


def build_trainer_arguments(
    config: TrainerConfig, model: ComposerModel, record: RunRecord, others: list[Callback]
) -> dict[str, Any]:
    """Build the Trainer's arguments that are the same in every run, and lock the run's folder.

    Raises:
        InputError: The folder is in use, or the checkpoint is another run's; or a callback or logger cannot be used.
    """
    chosen, unit = build_callbacks(config), MODALITIES[record.record["data"]["modality"]].unit
    folder = config.run_folder
    uploads = None if folder is None or folder.address is None else Uploads(folder.address)
    # First lock the folder, then select the checkpoint in it: another run could still write one.
    advice = "; the same command resumes" if config.autoresume else ""
    checkpoints = Checkpoints(folder, config.save_interval, config.save_num_checkpoints_to_keep, uploads, advice)
    load_path = build_load_path(config)
    precision = choose_precision(config.precision).trainer
    if load_path is not None:
        check_resume(load_path, model, [record, *others])
    return {
        "model": model,
        "max_duration": config.max_duration,
        "callbacks": [record, Throughput(), NanGuard(), checkpoints, *others, *chosen],
        "loggers": [*build_loggers(config, unit), *([] if uploads is None else [uploads])],
        "progress_bar": False,  # ours is among the loggers
        "precision": precision,
        "device_train_microbatch_size": config.device_train_microbatch_size,
        "seed": config.seed,
        "run_name": config.run_name,
        "load_path": load_path,  # instead of Composer's autoresume
        "load_ignore_keys": partial(drop_unused_scaler, precision=precision),
    }
