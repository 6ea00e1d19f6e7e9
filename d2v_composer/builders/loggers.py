"""Build loggers, ask their servers whether they accept the run."""

import os
import sys
from typing import Any
from unittest.mock import patch

from composer.loggers import LoggerDestination
from composer.utils import dist

from d2v_composer.builders.run_folder import errors_of, find_run_folder
from d2v_composer.callbacks.logging import ProgressLogger
from d2v_composer.callbacks.yaml_names import LOGGERS
from d2v_composer.checkpoints.resume import LOG
from d2v_composer.config.schema import TrainerConfig
from d2v_composer.system.addresses import RunFolder
from d2v_composer.system.errors import InputError, reason
from d2v_composer.system.machine import find_wrong_packages
from d2v_composer.system.ranks import rank_zero_first

OFFLINE = "WANDB_MODE=offline logs without a login or network, and `wandb sync` uploads it later"
# MLflow's own retry timeout is for a server that goes away during a run: seven retries, 120 seconds each.
IMPATIENT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


def ask_logging_servers(config: TrainerConfig) -> None:
    """Let rank 0, the only one that logs in, ask the servers of the run's loggers. Call it on every rank.

    Raises:
        InputError: A server does not accept the run; raised on every rank.
    """
    with rank_zero_first("the loggers"):
        if dist.get_global_rank() == 0:
            check_logging_servers(config)


def check_logging_servers(config: TrainerConfig) -> None:
    """Check the packages of the run's loggers, and ask the servers of W&B and MLflow whether they accept it.

    Raises:
        InputError: A package or a login is missing, or a server does not answer.
    """
    checks = {"wandb": _check_wandb, "mlflow": _check_mlflow}
    for name, arguments in config.loggers.items():
        if arguments is not None:
            with errors_of(f"loggers.{name}"):
                if wrong := list(find_wrong_packages(extra=name)):
                    raise InputError("; ".join(wrong))
                if name in checks:
                    checks[name](arguments)


def build_loggers(config: TrainerConfig) -> list[LoggerDestination]:
    """Build the progress logger and the section ``loggers``; the run's folder is the default place of what they write.

    JSON lines without a file name are left out of a run without a folder.

    Raises:
        InputError: A logger refuses the value of an argument.
    """
    loggers: list[LoggerDestination] = [_build_progress(config)]
    folder = find_run_folder(config)
    for name, arguments in config.loggers.items():
        if arguments is None or (name == "jsonl" and folder is None and "filename" not in arguments):
            continue
        with errors_of(f"loggers.{name}"):
            in_folder = arguments if folder is None else _in_run_folder(name, arguments, folder)
            loggers.append(LOGGERS[name](**in_folder))
    return loggers


def _build_progress(config: TrainerConfig) -> ProgressLogger:
    """Build a bar on a terminal, plain lines in a file or pipe, or both if the config asks for lines."""
    on_terminal = sys.stderr.isatty()
    prints_lines = config.log_to_console or (config.progress_bar and not on_terminal)
    return ProgressLogger(config.progress_bar and on_terminal, config.console_log_interval if prints_lines else None)


def _in_run_folder(name: str, arguments: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    """Add the run's folder to a logger's arguments where neither they nor the environment name a place."""
    local = folder.local.absolute()
    if name == "jsonl":
        return {"filename": str(folder.local / LOG)} | arguments
    if name == "tensorboard":
        return {"log_dir": str(local / "tensorboard_logs")} | arguments
    if name == "mlflow" and not {"MLFLOW_TRACKING_URI", "DATABRICKS_TOKEN"} & os.environ.keys():
        return {"tracking_uri": (local / "mlruns").as_uri()} | arguments
    if name == "wandb" and "WANDB_DIR" not in os.environ:
        return arguments | {"init_kwargs": {"dir": str(local)} | (arguments.get("init_kwargs") or {})}
    return arguments


def _check_wandb(arguments: dict[str, Any]) -> None:
    import wandb

    settings = wandb.setup().settings
    mode = (arguments.get("init_kwargs") or {}).get("mode") or settings.mode
    if mode != "online" or settings.identity_token_file is not None:
        return
    if wandb.api.api_key is None:  # wandb would ask for it, and wait
        raise InputError(f"no login: run `wandb login` or set WANDB_API_KEY; {OFFLINE}")
    try:
        wandb.login(verify=True)
    except wandb.Error as error:
        raise InputError(f"{reason(error)} `wandb login --relogin` replaces a key; {OFFLINE}") from error


def _check_mlflow(arguments: dict[str, Any]) -> None:
    address = str(arguments.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI"))
    if not address.startswith(("http://", "https://")):
        return
    import mlflow

    with patch.dict(os.environ, {**IMPATIENT, **os.environ}):
        mlflow.MlflowClient(address).search_experiments(max_results=1)
