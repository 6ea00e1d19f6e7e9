"""Functions that several kinds of runs share: build Composer's Trainer, resume, train and report."""

import copy
import hashlib
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import yaml
from composer import Trainer
from composer.core import Algorithm, Callback, DataSpec, Time, TimeUnit
from composer.loggers import LoggerDestination
from composer.models import ComposerModel
from composer.optim import ComposerScheduler, CosineAnnealingScheduler, CosineAnnealingWithWarmupScheduler
from composer.utils import dist, reproducibility
from torch import nn
from torch.utils.data import DataLoader

from d2v_composer.callbacks.algorithms import GradientNorm, SeededBatches
from d2v_composer.callbacks.checkpointing import Checkpoints, NanGuard, Stop
from d2v_composer.callbacks.logging import ProgressLogger, Throughput, Uploads, num_batches
from d2v_composer.callbacks.run_record import RunRecord
from d2v_composer.callbacks.trainer_state import find_callback
from d2v_composer.callbacks.zero_shot_retrieval import ZeroShotRetrieval
from d2v_composer.checkpoints.checkpoint import (
    LOG,
    Checkpoint,
    download_checkpoint,
    read_checkpoint,
)
from d2v_composer.checkpoints.resuming import drop_unused_scaler, share_newest
from d2v_composer.checkpoints.timm_student import convert_to_timm
from d2v_composer.config.choices import ALGORITHMS, CALLBACKS, LOGGERS, OPTIMIZERS
from d2v_composer.config.load import deep_merge
from d2v_composer.config.resume import FIXED, keys_marked
from d2v_composer.config.schema import (
    AlgorithmsConfig,
    OptimizerConfig,
    ShardLoaderConfig,
    TrainerConfig,
)
from d2v_composer.config.types import class_path
from d2v_composer.data import MODALITIES
from d2v_composer.evaluation.run_log import read_jsonl
from d2v_composer.models.backbone import Backbone, check_tensors
from d2v_composer.models.configs import TimmNetworkConfig
from d2v_composer.models.encoder import Inputs
from d2v_composer.models.precision import choose_precision, name_precision
from d2v_composer.models.provenance import Record
from d2v_composer.system.addresses import RunFolder, hide_secrets
from d2v_composer.system.command_line import d2v
from d2v_composer.system.errors import InputError, RunError, errors_of, reading, reason
from d2v_composer.system.fetch import cache_folder, is_remote
from d2v_composer.system.machine import describe_machine, package_versions
from d2v_composer.system.processes import allow_open_files, if_interrupted, num_ranks
from d2v_composer.system.ranks import join_ranks, node_leaders_first, rank_zero_first
from d2v_composer.system.third_party import patched_composer


def build_trainer(
    config: TrainerConfig,
    model: ComposerModel,
    train_loader: DataLoader | Sequence[Any],
    record_sections: Record,
    *,
    run_callbacks: Sequence[Callback] = (),
    callbacks: Sequence[Callback] = (),
    algorithms: Sequence[Algorithm] = (),
    loggers: Sequence[LoggerDestination] = (),
    prepare: Callable[[Any], Any] | None = None,
    stop: Stop | None = None,
    **arguments: Any,
) -> Trainer:
    """Build the Trainer with the arguments that all runs share, and lock the run's folder."""
    folder = config.run_folder
    uploads = None if folder is None or folder.address is None else Uploads(folder.address)
    chosen, scheduler = build_callbacks(config), build_scheduler(config, len(train_loader))
    record = build_run_record(config, **record_sections)
    precision = choose_precision(config.precision).trainer
    # First lock the folder, then select the checkpoint in it: another run could still write one.
    keep = config.save_num_checkpoints_to_keep
    checkpoints = Checkpoints(folder, config.save_interval, keep, uploads, resume_advice(config), stop)
    checkpoint, is_resumed = find_checkpoint(config, model, [record, *run_callbacks])
    with patched_composer(checkpoint and checkpoint.contents):
        return Trainer(
            model=model,
            train_dataloader=DataSpec(train_loader, microbatch_transforms=prepare),
            max_duration=config.max_duration,
            schedulers=scheduler,
            algorithms=[*build_algorithms(config.algorithms), *algorithms],
            callbacks=[
                *(record, Throughput(), NanGuard(), checkpoints),
                *(SeededBatches(config.seed), *run_callbacks, *chosen, *callbacks),
            ],
            loggers=[
                *build_loggers(config, MODALITIES[record_sections["data"]["modality"]].unit),
                *([] if uploads is None else [uploads]),
                *loggers,
            ],
            progress_bar=False,  # ours is among the loggers
            precision=precision,
            device_train_microbatch_size=config.device_train_microbatch_size,
            seed=config.seed,
            run_name=config.run_name,
            load_path=checkpoint and str(checkpoint.path),  # instead of Composer's autoresume
            load_weights_only=not is_resumed,
            load_ignore_keys=partial(drop_unused_scaler, precision=precision) if is_resumed else None,
            # Composer would evaluate what a checkpoint says of them as Python expressions.
            load_exclude_algorithms=checkpoint and checkpoint.algorithms,
            **arguments,
        )


def find_checkpoint(
    config: TrainerConfig, model: nn.Module, callbacks: Sequence[Callback]
) -> tuple[Checkpoint | None, bool]:
    """Read the newest checkpoint in the run's folder or, if there is none, the checkpoint in ``load_path``.

    Returns:
        The checkpoint, or ``None``; and False if the run takes only the checkpoint's weights, else True.
    """

    def accept(checkpoint: Checkpoint, callbacks: Sequence[Callback] = callbacks) -> None:
        with errors_of(str(checkpoint.path)):
            for callback in callbacks:  # another program saved no such state; then only tensors are compared
                if saved := checkpoint.saved_by(type(callback).__name__):
                    callback.load_state_dict(dict(saved))
            check_tensors(model, checkpoint.tensors, "")

    folder = config.run_folder
    if folder is not None and (newest := share_newest(folder, config.autoresume, accept)) is not None:
        return newest, True
    if config.load_path is None:
        return None, True
    cached = f"checkpoints/{hashlib.sha256(config.load_path.encode()).hexdigest()[:16]}.pt"
    path = cache_folder() / cached if is_remote(config.load_path) else Path(config.load_path)
    with node_leaders_first("the checkpoint"), errors_of("load_path"):
        if is_remote(config.load_path) and dist.get_local_rank() == 0:
            download_checkpoint(config.load_path, path)
        start, length = read_checkpoint(path), config.max_duration
    if config.load_weights_only:
        accept(start, ())
        return start, False
    with reading(path):
        unit, units = {"ba": ("batch", "batches"), "ep": ("epoch", "epochs")}[length[-2:]]
        if (trained := start.trained(unit)) >= int(length[:-2]):
            raise InputError(
                f"load_path: {config.load_path} was trained for {trained} {units}; max_duration must be longer, "
                f"got {length}"
            )
    accept(start)
    return start, True


def try_timm_student(
    key: str,
    student: Backbone,
    config: TrainerConfig,
) -> None:
    """Check that a timm student can be trained with the run's batch sizes, and then exported."""
    if not isinstance(student.config, TimmNetworkConfig):
        return
    batch_size, micro = config.global_train_batch_size // num_ranks(), config.device_train_microbatch_size
    smallest = batch_size % micro or micro if isinstance(micro, int) else batch_size
    with torch.random.fork_rng(devices=[]):
        trial = copy.deepcopy(student)
        place, batches = "global_train_batch_size", f"batches of {smallest} per rank"
        if isinstance(micro, int):
            place, batches = "device_train_microbatch_size", f"microbatches of {smallest}"
        # BatchNorm needs several values.
        with errors_of(f"{place}: {key} cannot be trained on {batches}"):
            trial.train().encoder(Inputs(trial.encoder.example(min(smallest, 2))))
        for name, buffer in trial.named_buffers():
            if "running_" in name:  # a new BatchNorm changes nothing
                buffer.add_(torch.rand_like(buffer))
        trial.train_alignment(trial.embedding)  # as in the file
        convert_to_timm(key, trial)


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of the parameters that require gradients."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = {
        is_vector: [weight for weight in weights if (weight.ndim <= 1) == is_vector] for is_vector in (False, True)
    }
    arguments = [
        {
            "params": group,
            "lr": config.lr,
            "weight_decay": 0.0 if is_vector and not config.decay_norms_and_biases else config.weight_decay,
        }
        for is_vector, group in groups.items()
        if group
    ]
    kind = OPTIMIZERS[config.name]
    return resolve_name(kind.path)(arguments, betas=config.betas, eps=config.eps, **kind.arguments)


def build_scheduler(config: TrainerConfig, batches_per_epoch: int) -> ComposerScheduler:
    """Build the schedule of the learning rate: a linear warm-up, then a cosine decay to ``alpha_f`` times ``lr``."""
    warmup, duration = map(Time.from_timestring, (config.scheduler.t_warmup, config.max_duration))
    batches = {TimeUnit.BATCH: 1, TimeUnit.EPOCH: batches_per_epoch}
    num_batches = batches[TimeUnit.DURATION] = duration.value * batches[duration.unit]
    num_warmup = int(warmup.value * batches[warmup.unit])
    if num_warmup > num_batches:
        raise InputError(config.long_warmup(f" with {batches_per_epoch} batches per epoch"))
    alpha_f = config.scheduler.alpha_f
    if num_warmup == 0:  # Composer would warn
        return CosineAnnealingScheduler(alpha_f=alpha_f)
    return CosineAnnealingWithWarmupScheduler(t_warmup=Time(num_warmup, TimeUnit.BATCH), alpha_f=alpha_f)


def build_algorithms(config: AlgorithmsConfig) -> list[Algorithm]:
    """Build the algorithms of the section ``algorithms``, then :class:`GradientNorm`."""
    algorithms = [
        resolve_name(ALGORITHMS[name])(**fields.model_dump()) for name, fields in config if fields is not None
    ]
    return [*algorithms, GradientNorm()]


def build_callbacks(config: TrainerConfig) -> list[Callback]:
    """Build the callbacks that the section ``callbacks`` names."""
    callbacks: list[Callback] = []
    for name, arguments in config.callbacks.items():
        if arguments is not None:
            with errors_of(f"callbacks.{name} with {arguments}"):
                callbacks.append(resolve_name(class_path(name, CALLBACKS))(**arguments))
    return callbacks


def build_loggers(config: TrainerConfig, unit: str) -> list[LoggerDestination]:
    """Build the progress logger, if ``progress_bar`` is true, and the loggers of the section ``loggers``.

    The logger ``jsonl`` is left out if the run has no folder and the logger has no ``filename``.
    """
    loggers: list[LoggerDestination] = [ProgressLogger(sys.stderr.isatty(), unit=unit)] if config.progress_bar else []
    folder = config.run_folder
    for name, arguments in config.loggers.items():
        if arguments is None or (name == "jsonl" and folder is None and "filename" not in arguments):
            continue
        with errors_of(f"loggers.{name}"):
            in_folder = {} if folder is None else arguments_in(folder, name)
            loggers.append(resolve_name(class_path(name, LOGGERS))(**deep_merge(in_folder, arguments)))
    return loggers


def arguments_in(folder: RunFolder, name: str) -> Record:
    """Return the arguments, if any, that let a logger write into the run's folder."""
    local = folder.local.absolute()
    if name == "jsonl":
        return {"filename": str(folder.local / LOG)}
    if name == "tensorboard":
        return {"log_dir": str(local / "tensorboard_logs")}
    if name == "mlflow" and not {"MLFLOW_TRACKING_URI", "DATABRICKS_TOKEN"} & os.environ.keys():
        return {"tracking_uri": (local / "mlruns").as_uri()}
    if name == "wandb":
        # In a clone, W&B keeps a git process that ignores SIGTERM as we do, and waits for its end forever.
        os.environ.setdefault("WANDB_DISABLE_GIT", "true")
        return {} if "WANDB_DIR" in os.environ else {"init_kwargs": {"dir": str(local)}}
    return {}


def build_run_record(config: TrainerConfig, **contents: Record) -> RunRecord:
    """Build the record of a run: config, command, versions, hardware and ``contents``."""
    sys.argv = hide_secrets(sys.argv)  # W&B records it, too
    record = {
        "config": config.model_dump(mode="json"),
        "command": re.sub("^'(d2v [a-z]+)'", r"\1", shlex.join(sys.argv)),
        **contents,
        "versions": package_versions(),
        "hardware": {
            **describe_machine(),
            "ranks": dist.get_world_size(),
            "precision": name_precision(config.precision),
        },
    }
    fixed = [f"config.{key}" for key in keys_marked(config, FIXED)]
    return RunRecord(record, config.run_folder and config.run_folder.local, fixed)


def join_and_seed(config: TrainerConfig) -> None:
    """Increase the limit of open files, connect the ranks, and seed all random number generators.

    Call this function on every rank.
    """
    allow_open_files()
    loader = config.train_loader
    join_ranks(loader.timeout if isinstance(loader, ShardLoaderConfig) and loader.remote is not None else 0)
    reproducibility.seed_all(config.seed)


def resume_advice(config: TrainerConfig) -> str:
    """Return the end of a message about a stopped run: advice on how to resume; '' if the run cannot resume."""
    return "; the same command resumes" if config.autoresume and config.save_folder is not None else ""


def fit_and_close(
    trainer: Trainer, config: TrainerConfig, header: Mapping[str, str], report: Callable[[], None]
) -> None:
    """Train to the end, report on rank 0, wait for the uploads, and close the Trainer."""
    # Only now: each DeviceGPU that Composer constructs allows TF32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    try:
        _fit(trainer, config, header)
        if dist.get_global_rank() == 0:
            report()
        with rank_zero_first("uploads"):  # uploads may take longer than collectives wait
            if (uploads := find_callback(trainer.state, Uploads)) is not None:
                uploads.wait()
            trainer.engine.close()
    except BaseException as error:
        # Not trainer.close(), which waits for all ranks: some may not have failed.
        trainer.engine.close()
        if isinstance(error, RuntimeError) and re.match(r"DataLoader worker .* (killed by|exited)", str(error)):
            advice = "if the machine's memory ran out, lower train_loader.num_workers"
            raise RunError(f"{reason(error)}; {advice}{resume_advice(config)}") from error
        raise
    trainer.close()


def _fit(trainer: Trainer, config: TrainerConfig, header: Mapping[str, str]) -> None:
    checkpoints = find_callback(trainer.state, Checkpoints)
    assert checkpoints is not None
    checkpoints.begin()
    if trainer.state.timestamp < config.max_duration:
        if dist.get_global_rank() == 0:
            print(_describe(trainer, config, header))
        trainer.fit()
        checkpoints.end_training(trainer.state)
        return
    if dist.get_global_rank() == 0:  # Composer would raise an error
        print(f"{config.run_folder}: this run is complete at {config.max_duration}; a new run needs another folder")
    # Composer saves the last checkpoint before the last evaluation, which a kill may have cut short.
    if trainer.state.evaluators:
        trainer.eval()


def _describe(trainer: Trainer, config: TrainerConfig, header: Mapping[str, str]) -> str:
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
    elif state.load_path is not None:
        lines["weights"] = f"from {state.load_path}"
    return hide_secrets("\n".join(f"{name:10}{text}" for name, text in lines.items()))


def write_run_report(trainer: Trainer, config: TrainerConfig, retrieval: ZeroShotRetrieval | None = None) -> None:
    """Write the report into the run's folder, unless ``report`` is false or the run has no folder or no log.

    An error is printed, not raised.
    """
    if not config.report or config.run_folder is None or not (config.run_folder.local / LOG).is_file():
        return
    from d2v_composer.report.page import write_report  # matplotlib takes a second to import
    from d2v_composer.report.run import Run, verdicts

    folder = config.run_folder.local
    measured: Any = () if retrieval is None else (retrieval.datasets, retrieval.results)
    try:
        with if_interrupted(
            lambda: f"the model is saved, but the report is not; to write the report, run {d2v('report', folder)}"
        ):
            record = yaml.safe_load((folder / "run.yaml").read_text())
            written = write_report(run := Run(record, read_jsonl(folder / LOG), *measured), folder)
    except Exception as error:  # noqa: BLE001  (training has finished: an unreadable log or a full disk must not fail it)
        problem = f"could not be written ({type(error).__name__}: {reason(error)})"
        print(f"report: {problem}; to try again, run {d2v('report', folder)}", file=sys.stderr)
        return
    print(*verdicts(run), f"report: {written[0]}", sep="\n")
    for path in written:
        trainer.logger.upload_file(str(path.relative_to(folder)), path, overwrite=True)  # if the folder is in a store
