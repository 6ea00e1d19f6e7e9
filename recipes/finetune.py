"""Fine-tune a classifier from a student, a teacher or a training checkpoint.

usage: composer recipes/finetune.py FILE.yaml model=PATH [dotted.key=value …]

    composer recipes/finetune.py yamls/finetune.yaml model=runs/quickstart/latest-rank0.pt
    composer recipes/finetune.py yamls/finetune.yaml model=student.safetensors \\
        'dataset={format: mds, root: photos}' run_name=photos
    composer recipes/finetune.py yamls/finetune.yaml model=student.safetensors train_encoder=true \\
        optimizer.layer_decay=0.75 run_name=whole

composer starts a process for each GPU; python trains in one process. `d2v fields fine-tuning` lists every field.
Run the same command again to resume an interrupted run.
"""

import d2v_composer.system.machine  # noqa: F401  (first: torch reads the environment when it is imported)

# isort: split
from collections.abc import Sequence

from d2v_composer.system import command_line

if __name__ == "__main__":
    command_line.begin(__doc__)

from composer import Callback, Trainer

from d2v_composer.config.load import load_finetune_config
from d2v_composer.runs.finetune import finetune


def main(argv: Sequence[str], callbacks: Sequence[Callback] = ()) -> Trainer:
    """Fine-tune a classifier with the settings in a YAML."""
    return finetune(load_finetune_config(argv), callbacks)


if __name__ == "__main__":
    command_line.run(main)
