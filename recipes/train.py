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
from collections.abc import Sequence

from d2v_composer.system import command_line

if __name__ == "__main__":
    command_line.begin(__doc__)

import yaml
from composer import Callback, Trainer

from d2v_composer.builders.fit import fit_and_close, join_and_seed, write_run_report
from d2v_composer.builders.run import build_run
from d2v_composer.callbacks import ZeroShotRetrieval
from d2v_composer.checkpoints.safe_load import LATEST, read_checkpoint
from d2v_composer.config.load import load_config
from d2v_composer.config.schema import TrainConfig
from d2v_composer.models.execution import join_units
from d2v_composer.report.tables import retrieval_table
from d2v_composer.system.command_line import d2v, print_next
from d2v_composer.system.third_party import patched_composer


def main(argv: Sequence[str], callbacks: Sequence[Callback] = ()) -> Trainer:
    """Train a student, from the run's last checkpoint if there is one.

    Args:
        argv: A YAML and its overrides.
        callbacks: Callbacks beside those of the YAML.
    """
    config = load_config(argv)
    join_and_seed(config)
    with patched_composer(read_checkpoint):
        run = build_run(config)
        run.trainer_arguments["callbacks"].extend(callbacks)
        trainer = Trainer(**run.trainer_arguments)
    if trainer.state.fsdp_config is not None:
        join_units(run.model, trainer.state.fsdp_config.device_mesh)
    fit_and_close(trainer, config, run.header, lambda: report(trainer, config, run.retrieval))
    name_next_steps(config)
    return trainer


def report(trainer: Trainer, config: TrainConfig, retrieval: ZeroShotRetrieval | None) -> None:
    """Print the retrieval table, and write the report into the run's folder."""
    if retrieval is not None and retrieval.history:
        print(f"\n{retrieval_table(retrieval)}")
    write_run_report(trainer, config, retrieval)


def name_next_steps(config: TrainConfig) -> None:
    """Print how to evaluate and export the student."""
    if config.run_folder is None:
        return
    checkpoint = config.run_folder.local / LATEST
    used = {
        name: labeled.model_dump(exclude_defaults=True)
        for name, labeled in config.retrieval.datasets.items()
        if labeled is not None
    }
    datasets = f"datasets={yaml.safe_dump(used, default_flow_style=True, sort_keys=False, width=1 << 20).strip()}"
    evaluate = [d2v("evaluate", f"model={checkpoint}", datasets)] if used else []
    print_next(*evaluate, d2v("export", checkpoint, config.run_folder.local / "student.safetensors"))


if __name__ == "__main__":
    command_line.run(main)
