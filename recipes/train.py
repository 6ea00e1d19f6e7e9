"""Distil a student: ``composer recipes/train.py FILE.yaml [dotted.key=value …]``."""

import sys
from collections.abc import Sequence

from composer import Trainer
from composer.utils import dist, get_device, reproducibility

from d2v_composer import cli
from d2v_composer.build import (
    build_algorithms,
    build_callbacks,
    build_loggers,
    build_model,
    build_optimizer,
    build_parallelism,
    build_precision,
    build_retrieval,
    build_run_record,
    build_scheduler,
    build_train_loader,
)
from d2v_composer.callbacks import FiniteLoss, GracefulStop, ZeroShotRetrieval
from d2v_composer.config import load_config
from d2v_composer.nodes import separate_signal_files
from d2v_composer.tables import retrieval_table

# How long ranks wait for the first of their machine to fetch the teacher and CIFAR.
DOWNLOADS_SECONDS = 3600


def main(argv: Sequence[str]) -> Trainer:
    """Train as the YAML says; a run that was interrupted goes on where its last checkpoint is."""
    config = load_config(argv)
    dist.initialize_dist(get_device(None), timeout=DOWNLOADS_SECONDS)
    reproducibility.seed_all(config.seed)

    model = build_model(config)
    train_loader = build_train_loader(config, model.teacher.config.image_size)
    retrieval = build_retrieval(config, model)
    graceful_stop = GracefulStop(config.save_interval)
    run_record = build_run_record(config, model.teacher)
    own_callbacks = [run_record, FiniteLoss(), graceful_stop] + ([] if retrieval is None else [retrieval])

    on_terminal = sys.stderr.isatty()
    with separate_signal_files():
        trainer = Trainer(
            model=model,
            train_dataloader=train_loader,
            max_duration=config.max_duration,
            optimizers=build_optimizer(config.optimizer, model),
            schedulers=build_scheduler(config, len(train_loader)),
            algorithms=build_algorithms(config),
            callbacks=own_callbacks + build_callbacks(config),
            loggers=build_loggers(config),
            # A bar on a terminal; plain lines in a log file or a pipe.
            progress_bar=config.progress_bar and on_terminal,
            log_to_console=config.log_to_console or (config.progress_bar and not on_terminal),
            console_log_interval=config.console_log_interval,
            precision=build_precision(config),
            device_train_microbatch_size=config.device_train_microbatch_size,
            parallelism_config=build_parallelism(config),
            seed=config.seed,
            run_name=config.run_name,
            save_folder=config.save_folder,
            save_interval=graceful_stop.save_interval,
            save_num_checkpoints_to_keep=config.save_num_checkpoints_to_keep,
            save_overwrite=True,  # a kill may leave half a checkpoint; the restart writes over it
            autoresume=config.autoresume and config.save_folder is not None,
            load_path=config.load_path,
        )
    try:
        if trainer.state.timestamp < config.max_duration:
            trainer.fit()
        elif dist.get_global_rank() == 0:  # Composer would take it for a mistake
            print(f"{config.save_folder}: finished at {config.max_duration}; a new run needs a run_name of its own")
    except BaseException:
        # Not trainer.close(): that waits for all ranks, and not all may have failed.
        trainer.engine.close()
        raise
    trainer.close()
    report(retrieval)
    return trainer


def report(retrieval: ZeroShotRetrieval | None) -> None:
    """Print what the run was for."""
    if retrieval is not None and retrieval.history and dist.get_global_rank() == 0:
        print(f"\n{retrieval_table(retrieval)}")


if __name__ == "__main__":
    cli.run(main)
