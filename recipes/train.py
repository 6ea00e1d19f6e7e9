"""Distil a student: ``composer recipes/train.py FILE.yaml [dotted.key=value …]``."""

import shlex
import sys
from collections.abc import Sequence
from functools import partial

import torch
from composer import Trainer
from composer.utils import dist, reproducibility

from d2v_composer.builders.callbacks import build_callbacks, build_folder_callbacks, build_loggers, build_run_record
from d2v_composer.builders.data import build_collective_timeout, build_train_loader
from d2v_composer.builders.evaluation import build_retrieval
from d2v_composer.builders.model import build_model, build_precision
from d2v_composer.builders.optimization import build_algorithms, build_optimizer, build_parallelism, build_scheduler
from d2v_composer.builders.run_folder import build_load_path, find_run_folder
from d2v_composer.callbacks import GracefulStop, NanGuard, RunRecord, Throughput, ZeroShotRetrieval
from d2v_composer.callbacks.jsonl_logger import read_jsonl
from d2v_composer.checkpoints.composer_checkpoint import read_checkpoint
from d2v_composer.checkpoints.resume import drop_unused_scaler
from d2v_composer.config.load import load_config
from d2v_composer.config.schema import TrainConfig
from d2v_composer.models.sharding import join_units
from d2v_composer.report import Run, write_report
from d2v_composer.report.tables import retrieval_table
from d2v_composer.system import cli
from d2v_composer.system.compat import patched_composer
from d2v_composer.system.multi_node import join_ranks, rank_zero_first
from d2v_composer.system.retry import reason
from d2v_composer.system.worker_lifetime import allow_open_files

# More than a run was seen to need. Every tensor that a worker has ready is an open file.
OPEN_FILES, OPEN_FILES_A_WORKER = 256, 16


def main(argv: Sequence[str]) -> Trainer:
    """Train as the YAML says; a run that was interrupted goes on where its last checkpoint is."""
    config = load_config(argv)
    allow_open_files(OPEN_FILES + OPEN_FILES_A_WORKER * config.train_loader.num_workers)
    join_ranks(build_collective_timeout(config))
    reproducibility.seed_all(config.seed)

    model = build_model(config)
    train_loader = build_train_loader(config, model.teacher.config.image_size)
    scheduler = build_scheduler(config, len(train_loader))
    retrieval = build_retrieval(config, model)
    chosen_callbacks = build_callbacks(config)
    graceful_stop = GracefulStop(config.save_interval)
    run_record = build_run_record(config, model.teacher)
    folder_callbacks = build_folder_callbacks(config)  # from here on the folder is ours alone
    load_path = build_load_path(config)
    nan_guard = NanGuard(graceful_stop.save_interval)
    own_callbacks = [*folder_callbacks, run_record, Throughput(), nan_guard, graceful_stop]
    own_callbacks += [] if retrieval is None else [retrieval]

    with patched_composer(read_checkpoint):
        trainer = Trainer(
            model=model,
            train_dataloader=train_loader,
            max_duration=config.max_duration,
            optimizers=build_optimizer(config.optimizer, model),
            schedulers=scheduler,
            algorithms=build_algorithms(config),
            callbacks=own_callbacks + chosen_callbacks,
            loggers=build_loggers(config),
            progress_bar=False,  # ours is among the loggers
            precision=build_precision(config),
            device_train_microbatch_size=config.device_train_microbatch_size,
            parallelism_config=build_parallelism(config),
            seed=config.seed,
            run_name=config.run_name,
            save_folder=config.save_folder,
            save_interval=graceful_stop.save_interval,
            save_num_checkpoints_to_keep=-1,  # CheckpointRetention sees to it
            save_overwrite=True,  # a kill may leave half a checkpoint; the restart writes over it
            load_path=load_path,  # autoresume is ours
            load_ignore_keys=partial(drop_unused_scaler, precision=config.precision),
        )
    # Here, because each DeviceGPU that Composer makes up to here allows it.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if trainer.state.fsdp_config is not None:
        join_units(model, trainer.state.fsdp_config.device_mesh)
    try:
        was_finished = trainer.state.timestamp >= config.max_duration
        if not was_finished:
            trainer.fit()
        elif dist.get_global_rank() == 0:  # Composer would take it for a mistake
            print(f"{config.save_folder}: finished at {config.max_duration}; a new run needs a run_name of its own")
        with rank_zero_first("report and uploads"):
            report(trainer, config, run_record, retrieval, was_finished)
            trainer.engine.close()
    except BaseException:
        # Not trainer.close(): that waits for all ranks, and not all may have failed.
        trainer.engine.close()
        raise
    trainer.close()
    return trainer


def report(
    trainer: Trainer,
    config: TrainConfig,
    run_record: RunRecord,
    retrieval: ZeroShotRetrieval | None,
    was_finished: bool,
) -> None:
    """Print what the run was for, and draw it in its folder."""
    if dist.get_global_rank() != 0:
        return
    if retrieval is not None and retrieval.history:
        print(f"\n{retrieval_table(retrieval)}")
    run_folder = find_run_folder(config)
    if not config.report or run_folder is None or not (run_folder.local / "log.jsonl").is_file():
        return
    folder = run_folder.local
    if was_finished and (folder / "report.html").is_file():  # which says where and how it was trained
        return
    neighbours, datasets = ({}, {}) if retrieval is None else (retrieval.neighbours, retrieval.datasets)
    try:
        written = write_report(Run(run_record.record, read_jsonl(folder / "log.jsonl"), neighbours, datasets), folder)
    except Exception as error:  # noqa: BLE001  (the training is finished, whatever may be wrong with the log or the disk)
        problem = f"cannot be made ({type(error).__name__}: {reason(error)})"
        print(f"report: {problem}; later: python recipes/report.py {shlex.quote(str(folder))}", file=sys.stderr)
        return
    print(f"report: {written[0]}")
    for path in written:
        if (key := run_folder.key(str(path.relative_to(folder)))) is not None:
            trainer.logger.upload_file(key, path, overwrite=True)


if __name__ == "__main__":
    cli.run(main)
