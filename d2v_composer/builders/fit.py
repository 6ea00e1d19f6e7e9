"""Join the ranks, train, write the report, and close the Trainer."""

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import yaml
from composer import Trainer
from composer.utils import dist, reproducibility

from d2v_composer.callbacks.checkpointing import Checkpoints
from d2v_composer.callbacks.logging import Uploads, num_batches
from d2v_composer.callbacks.trainer_state import find_callback
from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval
from d2v_composer.checkpoints.checkpoint import LOG
from d2v_composer.config.schema import TrainerConfig
from d2v_composer.evaluation.metrics import read_jsonl
from d2v_composer.models.precision import name_precision
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.command_line import d2v
from d2v_composer.system.errors import RunError, find_full_disk, reason
from d2v_composer.system.processes import allow_open_files, if_interrupted
from d2v_composer.system.ranks import join_ranks, rank_zero_first
from d2v_composer.system.third_party import lean_engine


def join_and_seed(config: TrainerConfig) -> None:
    """Raise the open-file limit, join the ranks, and seed. Call it first, on every rank."""
    allow_open_files()
    join_ranks(0 if config.train_loader.remote is None else config.train_loader.timeout)
    reproducibility.seed_all(config.seed)


def fit_and_close(
    trainer: Trainer, config: TrainerConfig, header: Mapping[str, str], report: Callable[[], None]
) -> None:
    """Train to the end, report on rank 0, wait for the uploads, and close the Trainer.

    The log opens with the run, its device, the lines of ``header`` (name → text), its model and its length.
    """
    # Only now: each DeviceGPU that Composer constructs allows TF32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    try:
        _fit(trainer, config, header)
        if dist.get_global_rank() == 0:
            report()
        with rank_zero_first("uploads"):  # they may take minutes, which no collective would wait
            if (uploads := find_callback(trainer.state, Uploads)) is not None:
                uploads.wait()
            trainer.engine.close()
    except BaseException as error:
        # Not trainer.close(), which waits for all ranks: some may not have failed.
        trainer.engine.close()
        if (fault := find_full_disk(error)) is not None:
            raise RunError(f"{config.run_folder} cannot be written: {fault.strerror}") from error
        if isinstance(error, RuntimeError) and re.match(r"DataLoader worker .* (killed by|exited)", str(error)):
            raise RunError(f"{reason(error)}; the same command resumes") from error
        raise
    trainer.close()


def _fit(trainer: Trainer, config: TrainerConfig, header: Mapping[str, str]) -> None:
    checkpoints = find_callback(trainer.state, Checkpoints)
    assert checkpoints is not None
    checkpoints.begin()
    if trainer.state.timestamp < config.max_duration:
        if dist.get_global_rank() == 0:
            print(_describe(trainer, config, header))
        with lean_engine(trainer):
            trainer.fit()
        checkpoints.end_training(trainer.state)
        return
    if dist.get_global_rank() == 0:  # Composer would raise an error
        print(f"{config.run_folder}: this run is complete at {config.max_duration}; a new run needs another folder")
    # Composer saves the last checkpoint before the last evaluation, which a kill may have cut short.
    if trainer.state.evaluators:
        trainer.eval()


def _describe(trainer: Trainer, config: TrainerConfig, header: Mapping[str, str]) -> str:
    """Return the lines at the top of a run's log: its name, device, model and duration."""
    state, steps, micro = trainer.state, num_batches(trainer.state), config.device_train_microbatch_size
    trained = sum(weight.numel() for weight in state.model.parameters() if weight.requires_grad)
    device = torch.cuda.get_device_name() if state.device.name == "gpu" else f"{torch.get_num_threads()} CPU threads"
    lines = {
        "run": f"{config.run_name}, {'not saved' if config.run_folder is None else f'saved in {config.run_folder}'}",
        "device": f"{dist.get_world_size()} × {device}, {name_precision(config.precision)}",
        **header,
        "model": f"{trained / 1e6:.1f} M trained parameters",
        "training": f"{steps:,} steps ({steps / int(state.dataloader_len or 1):.1f} epochs), batches of "
        f"{config.global_train_batch_size}" + ("" if micro is None else f", microbatches: {micro}"),
    }
    if state.timestamp.batch > 0:
        lines["resumed"] = f"from {state.load_path} at batch {int(state.timestamp.batch)}"
    return hide_secrets("\n".join(f"{name:10}{text}" for name, text in lines.items()))


def write_run_report(trainer: Trainer, config: TrainerConfig, retrieval: ZeroShotRetrieval | None = None) -> None:
    """Write the report into the run's folder, unless the config has none, and upload it with the checkpoints."""
    if not config.report or config.run_folder is None or not (config.run_folder.local / LOG).is_file():
        return
    from d2v_composer.report.answer import answer
    from d2v_composer.report.page import write_report  # matplotlib takes a second to import
    from d2v_composer.report.run import Run

    folder = config.run_folder.local
    measured: Any = () if retrieval is None else (retrieval.neighbors, retrieval.datasets, retrieval.results)
    try:
        with if_interrupted(
            lambda: f"the model is saved, but its report is not; to write it, run {d2v('report', folder)}"
        ):
            record = yaml.safe_load((folder / "run.yaml").read_text())
            written = write_report(run := Run(record, read_jsonl(folder / LOG), *measured), folder)
    except Exception as error:  # noqa: BLE001  (training has finished: an unreadable log or a full disk must not fail it)
        problem = f"could not be written ({type(error).__name__}: {reason(error)})"
        print(f"report: {problem}; to try again, run {d2v('report', folder)}", file=sys.stderr)
        return
    print(*answer(run), f"report: {written[0]}", sep="\n")
    for path in written:
        trainer.logger.upload_file(str(path.relative_to(folder)), path, overwrite=True)  # if the folder is in a store
