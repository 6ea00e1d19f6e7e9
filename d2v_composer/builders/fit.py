"""Run a Trainer to its end, describe the run before, and write its report after."""

import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from composer import State, Trainer
from composer.utils import dist

from d2v_composer.builders.run import BuiltRun
from d2v_composer.builders.run_folder import find_run_folder
from d2v_composer.callbacks.checkpointing import Checkpoints
from d2v_composer.callbacks.logging import Uploads, num_batches
from d2v_composer.callbacks.trainer_state import find_callback
from d2v_composer.config.schema import FinetuneConfig, TrainConfig, TrainerConfig
from d2v_composer.evaluation.metrics import read_jsonl
from d2v_composer.models.execution import name_precision
from d2v_composer.report.page import write_report
from d2v_composer.report.run import Run
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.command_line import d2v
from d2v_composer.system.errors import RunError, find_full_disk, reason
from d2v_composer.system.processes import if_interrupted
from d2v_composer.system.ranks import rank_zero_first

if TYPE_CHECKING:  # a distillation needs nothing of it
    from d2v_composer.builders.finetune import BuiltFinetuning

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
        if dist.get_global_rank() == 0:
            report(is_new)
        with rank_zero_first("uploads"):  # they may take minutes, which no collective would wait
            if (uploads := find_callback(trainer.state, Uploads)) is not None:
                uploads.wait()
            trainer.engine.close()
    except BaseException as error:
        # Not trainer.close(), which waits for all ranks: some may not have failed.
        trainer.engine.close()
        if (fault := find_full_disk(error)) is not None:
            raise RunError(f"{config.save_folder}: cannot be written: {fault.strerror}") from error
        if isinstance(error, RuntimeError) and re.match(r"DataLoader worker .* (killed by|exited)", str(error)):
            raise RunError(f"{reason(error)}; the same command resumes") from error
        raise
    trainer.close()


def _fit(trainer: Trainer, config: TrainerConfig, header: Callable[[], str]) -> bool:
    """Train to the end; return False if the run had finished before."""
    if trainer.state.timestamp < config.max_duration:
        if dist.get_global_rank() == 0:
            print(header())
        trainer.fit()
        if (checkpoints := find_callback(trainer.state, Checkpoints)) is not None:
            checkpoints.end_training(trainer.state)
        return True
    if dist.get_global_rank() == 0:  # Composer would raise an error
        print(f"{config.save_folder}: finished at {config.max_duration}; a new run needs a run_name of its own")
    # Composer saves the last checkpoint before the last evaluation, which a kill may have cut short.
    if trainer.state.evaluators:
        trainer.eval()
    return False


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
        with if_interrupted(lambda: f"the model is saved, not its report; later: {d2v('report', folder)}"):
            written = write_report(make_run(read_jsonl(folder / "log.jsonl")), folder)
    except Exception as error:  # noqa: BLE001  (training has finished: an unreadable log or a full disk must not fail it)
        problem = f"cannot be made ({type(error).__name__}: {reason(error)})"
        print(f"report: {problem}; later: {d2v('report', folder)}", file=sys.stderr)
        return
    print(f"report: {written[0]}")
    for path in written:
        trainer.logger.upload_file(str(path.relative_to(folder)), path, overwrite=True)  # if the folder is in a store


def describe_run(config: TrainConfig, run: BuiltRun, state: State) -> str:
    """Return the lines that open a run's log: what trains, on what, for how long.

    Args:
        config: The run's config.
        run: As built.
        state: The Trainer's, with a checkpoint loaded if the run resumes.
    """
    data, teacher, student = run.record.record["data"], run.model.teacher, run.model.student
    lines = {
        "images": f"{data['samples']:,} in {hide_secrets(str(data['location']))}",
        "model": f"encoder {_millions(teacher.encoder)}, "
        f"teacher {len(teacher.block_list)} blocks {_millions(teacher.blocks)}, "
        f"student {len(student.block_list)} blocks {_millions(student.blocks)}",
    }
    if run.retrieval is not None:
        sets = ", ".join(run.retrieval.datasets)
        lines["retrieval"] = f"{sets} every {config.retrieval.interval}, primary embedding {run.retrieval.primary}"
    if config.compile:
        lines["compiling"] = "the first step takes about a minute"
    return _header(config, state, lines)


def describe_finetuning(config: FinetuneConfig, built: "BuiltFinetuning", state: State) -> str:
    """Return the lines that open a fine-tuning's log; see :func:`describe_run`."""
    backbone, images = built.model.backbone, built.images
    start = "random weights" if config.from_scratch else hide_secrets(config.model)
    encoder = "trained" if config.train_encoder else "frozen"
    lines = {
        "images": f"{images.about['samples']:,} to train, {len(images.test.labels):,} to evaluate, "
        f"{built.model.head.out_features} classes",
        "model": f"{built.record.record['model']['kind']} from {start}: "
        f"encoder {_millions(backbone.encoder)}, {encoder}, "
        f"{len(backbone.block_list)} blocks {_millions(backbone.blocks)}, head on {built.model.embedding}",
    }
    return _header(config, state, lines)


def _header(config: TrainerConfig, state: State, middle: Mapping[str, str]) -> str:
    folder = "not saved" if config.save_folder is None else f"saved in {hide_secrets(config.save_folder)}"
    steps, batch = num_batches(state), describe_batch(config, dist.get_world_size())
    lines = {
        "run": f"{config.run_name}, {folder}",
        "device": describe_device(state.device.name, config.precision),
        **middle,
        "training": f"{steps:,} steps ({steps / int(state.dataloader_len or 1):.1f} epochs) of {batch}",
    }
    if state.timestamp.batch > 0:
        lines["resumed"] = f"from {state.load_path} at batch {int(state.timestamp.batch)}"
    return "\n".join(f"{name:10}{text}" for name, text in lines.items())


def describe_device(name: str, precision: str) -> str:
    """Describe what computes, and how.

    Args:
        name: Composer's: gpu, cpu, ….
        precision: fp32, amp_bf16 or amp_fp16.
    """
    ranks = dist.get_world_size()
    on = "" if ranks == 1 else f"{ranks} ranks, "
    if name == "gpu":
        return f"{on}{torch.cuda.get_device_name()}, {precision}"
    is_emulated = precision == "amp_bf16" != name_precision("auto", on_gpu=False)
    hint = " without instructions for it: precision=auto is many times faster" if is_emulated else ""
    return f"{on}{name}, {torch.get_num_threads()} threads, {precision}{hint}"


def describe_batch(config: TrainerConfig, ranks: int) -> str:
    """Describe the images of one step, and the parts in which they are processed if there are several."""
    micro, on_each = config.device_train_microbatch_size, config.global_train_batch_size // ranks
    text = f"{config.global_train_batch_size} images" + (f", {on_each} a device" if ranks > 1 else "")
    return text if micro in (None, on_each) else f"{text}, microbatches: {micro}"


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M"
