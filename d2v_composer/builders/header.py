"""Describe a run in a few lines, before it trains."""

import torch
from composer.core import State
from composer.utils import dist

from d2v_composer.builders.run import BuiltRun
from d2v_composer.callbacks.progress_logger import num_batches
from d2v_composer.config.schema import TrainConfig
from d2v_composer.system.addresses import hide_secrets

__all__ = ["describe_run"]


def describe_run(config: TrainConfig, run: BuiltRun, state: State) -> str:
    """Return the lines that open a run's log: what trains, on what, for how long.

    Args:
        config: The run's.
        run: As built.
        state: The Trainer's, with a checkpoint loaded if the run resumes.
    """
    data = run.record.record["data"]
    teacher, student = run.model.teacher, run.model.student
    micro = config.device_train_microbatch_size or config.global_train_batch_size // dist.get_world_size()
    lines = {
        "run": f"{config.run_name}, saved in {hide_secrets(str(config.save_folder))}",
        "device": f"{_describe_device(state)}, {config.precision}",
        "images": f"{data['samples']:,} in {hide_secrets(str(data['location']))}",
        "model": f"encoder {_millions(teacher.encoder)}, "
        f"teacher {len(teacher.block_list)} blocks {_millions(teacher.blocks)}, "
        f"student {len(student.block_list)} blocks {_millions(student.blocks)}",
        "training": f"{_describe_length(state)} of {config.global_train_batch_size} images"
        + (f", microbatches of {micro} a device" if micro != config.global_train_batch_size else ""),
    }
    if run.retrieval is not None:
        sets = ", ".join(run.retrieval.datasets)
        lines["retrieval"] = f"{sets} every {config.retrieval.interval}, headline {run.retrieval.headline}"
    if state.timestamp.batch > 0:
        lines["resumed"] = f"from {run.trainer_arguments['load_path']} at batch {int(state.timestamp.batch)}"
    if config.compile:
        lines["compiling"] = "the first step takes about a minute"
    return "\n".join(f"{name:10}{text}" for name, text in lines.items())


def _describe_device(state: State) -> str:
    ranks = dist.get_world_size()
    on = "" if ranks == 1 else f"{ranks} ranks, "
    if state.device.name == "gpu":
        return f"{on}{torch.cuda.get_device_name()}"
    return f"{on}{state.device.name}, {torch.get_num_threads()} threads{' each' if ranks > 1 else ''}"


def _describe_length(state: State) -> str:
    steps, per_epoch = num_batches(state), int(state.dataloader_len or 1)
    return f"{steps:,} steps ({steps / per_epoch:.1f} epochs)"


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M"
