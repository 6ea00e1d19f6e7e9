"""Distil a student: train, save, retrieve, report.

usage: composer recipes/train.py FILE.yaml [dotted.key=value …]

    composer recipes/train.py yamls/quickstart.yaml
    composer recipes/train.py yamls/quickstart.yaml run_name=longer max_duration=10ep student.depth=2
    composer recipes/train.py yamls/distill.yaml train_loader.remote=s3://BUCKET/imagenet/train

composer starts a process for each GPU; on one device, python does the same. yamls/README.md describes every field. The
same command again resumes the run. recipes/preflight.py rehearses it in minutes.
"""

import d2v_composer.system.cpu_threads  # noqa: F401  (first: torch reads the environment when it is imported)

# isort: split
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from d2v_composer.system import cli

if __name__ == "__main__":
    cli.begin(__doc__)

import torch
import yaml
from composer import Callback, Trainer
from composer.utils import dist, reproducibility

from d2v_composer.builders.data import build_collective_timeout, count_open_files
from d2v_composer.builders.header import describe_run
from d2v_composer.builders.run import BuiltRun, build_run
from d2v_composer.builders.run_folder import find_run_folder
from d2v_composer.callbacks.pictures import log_picture_files
from d2v_composer.checkpoints.composer_checkpoint import read_checkpoint
from d2v_composer.checkpoints.pointer import LATEST
from d2v_composer.config.load import load_config
from d2v_composer.config.schema import LabelledSetConfig, TrainConfig
from d2v_composer.evaluation.metrics_log import read_jsonl
from d2v_composer.models.sharding import join_units
from d2v_composer.report.page import write_report
from d2v_composer.report.run import Run
from d2v_composer.report.tables import retrieval_table
from d2v_composer.system.compat import patched_composer
from d2v_composer.system.multi_node import join_ranks, rank_zero_first
from d2v_composer.system.next_step import d2v, print_next
from d2v_composer.system.retry import reason
from d2v_composer.system.worker_lifetime import allow_open_files, end_workers


def main(argv: Sequence[str], callbacks: Sequence[Callback] = ()) -> Trainer:
    """Train a student, from the run's last checkpoint if there is one.

    Args:
        argv: A YAML and its overrides.
        callbacks: Callbacks beside those of the YAML.
    """
    config = load_config(argv)
    allow_open_files(count_open_files(config))
    join_ranks(build_collective_timeout(config))
    reproducibility.seed_all(config.seed)
    with patched_composer(read_checkpoint):
        run = build_run(config)
        run.trainer_arguments["callbacks"].extend(callbacks)
        trainer = Trainer(**run.trainer_arguments)
    # Only now: each DeviceGPU that Composer constructs allows TF32.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
    if trainer.state.fsdp_config is not None:
        join_units(run.model, trainer.state.fsdp_config.device_mesh)
    try:
        is_new = fit(trainer, config, run)
        # It takes seconds. The uploads may take minutes, which no collective would wait.
        if dist.get_global_rank() == 0:
            report(trainer, config, run, is_new)
        with rank_zero_first("uploads"):
            trainer.engine.close()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            end_workers()  # their uploads may take minutes
        # Not trainer.close(), which waits for all ranks: some may not have failed.
        trainer.engine.close()
        raise
    trainer.close()
    name_next_steps(config)
    return trainer


def fit(trainer: Trainer, config: TrainConfig, run: BuiltRun) -> bool:
    """Train to the end; return False if the run had finished before."""
    if trainer.state.timestamp < config.max_duration:
        if dist.get_global_rank() == 0:
            print(describe_run(config, run, trainer.state))
        trainer.fit()
        run.graceful_stop.end_training(trainer.state, trainer.logger)
        return True
    if dist.get_global_rank() == 0:  # Composer would raise an error
        print(f"{config.save_folder}: finished at {config.max_duration}; a new run needs a run_name of its own")
    return False


def report(trainer: Trainer, config: TrainConfig, run: BuiltRun, is_new: bool) -> None:
    """Print the retrieval table, and write the report into the run's folder."""
    retrieval, run_folder = run.retrieval, find_run_folder(config)
    if retrieval is not None and retrieval.history:
        print(f"\n{retrieval_table(retrieval)}")
    if not config.report or run_folder is None or not (run_folder.local / "log.jsonl").is_file():
        return
    folder = run_folder.local
    if not is_new and (folder / "report.html").is_file():  # it says where and how the run was trained
        return
    neighbours, datasets = ({}, {}) if retrieval is None else (retrieval.neighbours, retrieval.datasets)
    try:
        written = write_report(Run(run.record.record, read_jsonl(folder / "log.jsonl"), neighbours, datasets), folder)
        log_picture_files(trainer.logger, written[1:])
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"the student is saved, not its report; later: {d2v('report', folder)}") from error
    except Exception as error:  # noqa: BLE001  (training has finished: an unreadable log or a full disk must not fail it)
        problem = f"cannot be made ({type(error).__name__}: {reason(error)})"
        print(f"report: {problem}; later: {d2v('report', folder)}", file=sys.stderr)
        return
    print(f"report: {written[0]}")
    for path in written:
        if (key := run_folder.key(str(path.relative_to(folder)))) is not None:
            trainer.logger.upload_file(key, path, overwrite=True)


def name_next_steps(config: TrainConfig) -> None:
    """Print how to evaluate and export the student."""
    run_folder = find_run_folder(config)
    if run_folder is None:
        return
    checkpoint = run_folder.local / LATEST
    retrieval = config.retrieval
    used = {name: differing(labelled) for name, labelled in retrieval.datasets.items() if labelled is not None}
    datasets = f"datasets={yaml.safe_dump(used, default_flow_style=True, sort_keys=False, width=1 << 20).strip()}"
    evaluate = [d2v("evaluate", f"model={checkpoint}", datasets)] if used else []
    print_next(*evaluate, d2v("export", checkpoint, run_folder.local / "student.safetensors"))


def differing(section: LabelledSetConfig) -> dict[str, Any]:
    """Return the fields of a section that are not the default."""
    return {name: value for name, value in asdict(section).items() if value != getattr(LabelledSetConfig, name, None)}


if __name__ == "__main__":
    cli.run(main)
