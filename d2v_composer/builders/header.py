"""Describe a run in a few lines, before it trains."""

import torch
from composer.core import State
from composer.utils import dist

from d2v_composer.builders.finetune import BuiltFinetuning
from d2v_composer.builders.run import BuiltRun
from d2v_composer.callbacks.progress_logger import num_batches
from d2v_composer.config.finetune import FinetuneConfig
from d2v_composer.config.schema import TrainConfig, TrainerConfig
from d2v_composer.models.precision import name_precision
from d2v_composer.system.addresses import hide_secrets

__all__ = ["describe_batch", "describe_device", "describe_finetuning", "describe_folder", "describe_run"]


def describe_run(config: TrainConfig, run: BuiltRun, state: State) -> str:
    """Return the lines that open a run's log: what trains, on what, for how long.

    Args:
        config: The run's.
        run: As built.
        state: The Trainer's, with a checkpoint loaded if the run resumes.
    """
    data = run.record.record["data"]
    teacher, student = run.model.teacher, run.model.student
    lines = {
        "run": f"{config.run_name}, {describe_folder(config.save_folder)}",
        "device": describe_device(state.device.name, config.precision),
        "images": f"{data['samples']:,} in {hide_secrets(str(data['location']))}",
        "model": f"encoder {_millions(teacher.encoder)}, "
        f"teacher {len(teacher.block_list)} blocks {_millions(teacher.blocks)}, "
        f"student {len(student.block_list)} blocks {_millions(student.blocks)}",
        "training": f"{_describe_length(state)} of {describe_batch(config, dist.get_world_size())}",
    }
    if run.retrieval is not None:
        sets = ", ".join(run.retrieval.datasets)
        lines["retrieval"] = f"{sets} every {config.retrieval.interval}, headline {run.retrieval.headline}"
    if state.timestamp.batch > 0:
        lines["resumed"] = f"from {run.trainer_arguments['load_path']} at batch {int(state.timestamp.batch)}"
    if config.compile:
        lines["compiling"] = "the first step takes about a minute"
    return "\n".join(f"{name:10}{text}" for name, text in lines.items())


def describe_finetuning(config: FinetuneConfig, built: BuiltFinetuning, state: State) -> str:
    """Return the lines that open a fine-tuning's log; see :func:`describe_run`."""
    backbone, about = built.model.backbone, built.record.record["model"]
    num_train, num_test = built.images.num_train, len(built.images.test.labels)
    trained = sum(each.numel() for each in built.model.parameters() if each.requires_grad)
    start = "random weights" if config.from_scratch else hide_secrets(config.model)
    lines = {
        "run": f"{config.run_name}, {describe_folder(config.save_folder)}",
        "device": describe_device(state.device.name, config.precision),
        "images": f"{num_train:,} to train, {num_test:,} to evaluate, {built.model.head.out_features} classes",
        "model": f"{about['kind']} from {start}: encoder {_millions(backbone.encoder)}, "
        f"{len(backbone.block_list)} blocks {_millions(backbone.blocks)}, head on {built.model.embedding}",
        "trained": f"{trained / 1e6:.1f} M parameters, encoder {'trained' if config.train_encoder else 'frozen'}",
        "training": f"{_describe_length(state)} of {describe_batch(config, dist.get_world_size())}",
    }
    if state.timestamp.batch > 0:
        lines["resumed"] = f"from {built.trainer_arguments['load_path']} at batch {int(state.timestamp.batch)}"
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
    threads = f"{torch.get_num_threads()} threads{' each' if ranks > 1 else ''}"
    return f"{on}{name}, {threads}, {precision}{hint}"


def describe_folder(save_folder: str | None) -> str:
    """Name the place of the run's files."""
    return "not saved" if save_folder is None else f"saved in {hide_secrets(save_folder)}"


def describe_batch(config: TrainerConfig, ranks: int) -> str:
    """Describe the images of one step, and the parts in which they are processed if there are several."""
    micro, on_each = config.device_train_microbatch_size, config.global_train_batch_size // ranks
    text = f"{config.global_train_batch_size} images" + (f", {on_each} a device" if ranks > 1 else "")
    if micro == "auto":
        return f"{text}, microbatches found automatically"
    return text if micro in (None, on_each) else f"{text}, microbatches of {micro}"


def _describe_length(state: State) -> str:
    steps, per_epoch = num_batches(state), int(state.dataloader_len or 1)
    return f"{steps:,} steps ({steps / per_epoch:.1f} epochs)"


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M"
