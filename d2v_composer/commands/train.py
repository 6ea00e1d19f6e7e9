"""Distill a student with the settings in a YAML.

usage: d2v train FILE.yaml [dotted.key=value …]

    d2v init quickstart > quickstart.yaml
    d2v train quickstart.yaml run_name=longer max_duration=10ep student.depth=2

Training uses every GPU of this machine, or the CPU; `composer -n N recipes/train.py …`, in a clone of the repository,
uses N GPUs. `d2v fields training` lists every field. Run the same command again to resume a run that saves checkpoints.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from d2v_composer.system import command_line
from d2v_composer.system.addresses import STUDENT_FILE
from d2v_composer.system.command_line import d2v, print_next
from d2v_composer.system.processes import relaunch_on_gpus

if TYPE_CHECKING:
    from composer import Callback, Trainer


def main(argv: Sequence[str]) -> None:
    """Train with the settings in a YAML, on every GPU of this machine."""
    command_line.show_help(argv, __doc__)
    relaunch_on_gpus("train", *argv)
    train(argv)


def train(argv: Sequence[str], callbacks: "Sequence[Callback]" = ()) -> "Trainer":
    """Train a student, and return the closed Trainer.

    Args:
        argv: The YAML's path, then any number of ``dotted.key=value``.
        callbacks: Callbacks besides the YAML's.
    """
    import yaml

    from d2v_composer.checkpoints.checkpoint import LATEST
    from d2v_composer.config.load import load_config
    from d2v_composer.runs.distill import train_student

    config = load_config(argv, needs_data=True)
    trainer = train_student(config, callbacks)
    if config.run_folder is not None:
        checkpoint = config.run_folder.local / LATEST
        used = {
            name: labeled.model_dump(exclude_defaults=True)
            for name, labeled in config.retrieval.datasets.items()
            if labeled is not None
        }
        datasets = f"datasets={yaml.safe_dump(used, default_flow_style=True, sort_keys=False, width=1 << 20).strip()}"
        evaluate = [d2v("evaluate", f"model={checkpoint}", datasets)] if used else []
        print_next(*evaluate, d2v("export", checkpoint, config.run_folder.local / STUDENT_FILE))
    return trainer
