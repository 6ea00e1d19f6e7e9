"""Run a Trainer to its end, and write the run's report."""

import sys
from collections.abc import Callable, Mapping

import torch
from composer import State, Trainer
from composer.utils import dist

from d2v_composer.builders.run_folder import find_run_folder
from d2v_composer.callbacks import GracefulStop
from d2v_composer.callbacks.pictures import log_picture_files
from d2v_composer.callbacks.trainer_state import find_callback
from d2v_composer.config.schema import TrainerConfig
from d2v_composer.evaluation.metrics_log import read_jsonl
from d2v_composer.report.page import write_report
from d2v_composer.report.run import Run
from d2v_composer.system.multi_node import rank_zero_first
from d2v_composer.system.next_step import d2v
from d2v_composer.system.retry import reason
from d2v_composer.system.worker_lifetime import end_workers

__all__ = ["fit_and_close", "write_run_report"]

Log = Mapping[str, Mapping[int, float]]


def fit_and_close(
    trainer: Trainer, config: TrainerConfig, header: Callable[[], str], report: Callable[[bool], None]
) -> None:
    """Train to the end, report on rank 0, wait for the uploads, and close the Trainer.

    Args:
        trainer: With a checkpoint loaded if the run resumes.
        config: The run's.
        header: Returns the lines that open the run's log.
        report: Called with False if the run had finished before.
    """
    # Only now: each DeviceGPU that Composer constructs allows TF32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    try:
        is_new = _fit(trainer, config, header)
        # It takes seconds. The uploads may take minutes, which no collective would wait.
        if dist.get_global_rank() == 0:
            report(is_new)
        with rank_zero_first("uploads"):
            trainer.engine.close()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            end_workers()  # their uploads may take minutes
        # Not trainer.close(), which waits for all ranks: some may not have failed.
        trainer.engine.close()
        raise
    trainer.close()


def _fit(trainer: Trainer, config: TrainerConfig, header: Callable[[], str]) -> bool:
    """Train to the end; return False if the run had finished before."""
    if trainer.state.timestamp < config.max_duration:
        if dist.get_global_rank() == 0:
            print(header())
        trainer.fit()
        graceful_stop = find_callback(trainer.state, GracefulStop)
        if graceful_stop is not None:
            graceful_stop.end_training(trainer.state, trainer.logger)
        return True
    if dist.get_global_rank() == 0:  # Composer would raise an error
        print(f"{config.save_folder}: finished at {config.max_duration}; a new run needs a run_name of its own")
    # Composer saves the last checkpoint before the last evaluation, which a kill may have cut short.
    if trainer.state.evaluators and not _is_evaluated(trainer.state, config):
        trainer.eval()
    return False


def _is_evaluated(state: State, config: TrainerConfig) -> bool:
    """Tell whether rank 0's log has an evaluation after the last batch."""
    found = [False]
    if dist.get_global_rank() == 0 and (folder := find_run_folder(config)) is not None:
        path, prefix = folder.local / "log.jsonl", f"metrics/{state.evaluators[0].label}/"
        series = read_jsonl(path) if path.is_file() else {}
        found = [any(key.startswith(prefix) and int(state.timestamp.batch) in series[key] for key in series)]
    dist.broadcast_object_list(found)
    return found[0]


def write_run_report(trainer: Trainer, config: TrainerConfig, make_run: Callable[[Log], Run], is_new: bool) -> None:
    """Write the report into the run's folder, unless the config has none, and upload it with the checkpoints.

    Args:
        trainer: Its loggers receive the plots.
        config: The run's.
        make_run: Makes the report's contents of the run's log.
        is_new: False if the run had finished before: a report that exists says where and how it was trained.
    """
    run_folder = find_run_folder(config)
    if not config.report or run_folder is None or not (run_folder.local / "log.jsonl").is_file():
        return
    folder = run_folder.local
    if not is_new and (folder / "report.html").is_file():
        return
    try:
        written = write_report(make_run(read_jsonl(folder / "log.jsonl")), folder)
        log_picture_files(trainer.logger, written[1:])
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"the model is saved, not its report; later: {d2v('report', folder)}") from error
    except Exception as error:  # noqa: BLE001  (training has finished: an unreadable log or a full disk must not fail it)
        problem = f"cannot be made ({type(error).__name__}: {reason(error)})"
        print(f"report: {problem}; later: {d2v('report', folder)}", file=sys.stderr)
        return
    print(f"report: {written[0]}")
    for path in written:
        if (key := run_folder.key(str(path.relative_to(folder)))) is not None:
            trainer.logger.upload_file(key, path, overwrite=True)
