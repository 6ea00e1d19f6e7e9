"""Build the loggers of a run."""

import os
import sys
from typing import Any

from composer.loggers import LoggerDestination

from d2v_composer.builders.run_folder import errors_of
from d2v_composer.callbacks.logging import ProgressLogger
from d2v_composer.checkpoints.resume import LOG
from d2v_composer.config.load import layered
from d2v_composer.config.schema import LOGGERS, TrainerConfig
from d2v_composer.system.addresses import RunFolder


def build_loggers(config: TrainerConfig) -> list[LoggerDestination]:
    """Build the progress logger and the section ``loggers``; the run's folder is the default place of what they write.

    JSON lines without a file name are left out of a run without a folder.

    Raises:
        InputError: A logger's package is missing, or it refuses the value of an argument.
    """
    loggers: list[LoggerDestination] = [ProgressLogger(bar=sys.stderr.isatty())] if config.progress_bar else []
    folder = config.run_folder
    for name, arguments in config.loggers.items():
        if arguments is None or (name == "jsonl" and folder is None and "filename" not in arguments):
            continue
        with errors_of(f"loggers.{name}"):
            loggers.append(LOGGERS[name](**layered({} if folder is None else places(name, folder), arguments)))
    return loggers


def places(name: str, folder: RunFolder) -> dict[str, Any]:
    """Return a logger's arguments that let it write into the run's folder, unless the environment names a place."""
    local = folder.local.absolute()
    if name == "jsonl":
        return {"filename": str(folder.local / LOG)}
    if name == "tensorboard":
        return {"log_dir": str(local / "tensorboard_logs")}
    if name == "mlflow" and not {"MLFLOW_TRACKING_URI", "DATABRICKS_TOKEN"} & os.environ.keys():
        return {"tracking_uri": (local / "mlruns").as_uri()}
    if name == "wandb" and "WANDB_DIR" not in os.environ:
        return {"init_kwargs": {"dir": str(local)}}
    return {}
