"""Train a detector on the features of a student or a timm model, with boxes in COCO's format.

usage: composer recipes/detect.py FILE.yaml model=PATH [dotted.key=value …]

    composer recipes/detect.py yamls/detect.yaml model=student.safetensors
    composer recipes/detect.py yamls/detect.yaml model=student.safetensors run_name=photos image_size=640 \\
        dataset.train.images=photos/train dataset.train.annotations=photos/train.json \\
        dataset.test.images=photos/test dataset.test.annotations=photos/test.json
    composer recipes/detect.py yamls/detect.yaml model=timm/resnet18 pretrained=false run_name=scratch

composer starts a process for each GPU; python trains in one process. `d2v fields detection` lists every field.
Run the same command again to resume an interrupted run.
"""

import d2v_composer.system.machine  # noqa: F401  (first: torch reads the environment when it is imported)

# isort: split
from collections.abc import Sequence

from d2v_composer.system import command_line

if __name__ == "__main__":
    command_line.begin(__doc__)

from composer import Callback, Trainer

from d2v_composer.config.load import load_detect_config
from d2v_composer.runs.detect import detect


def main(argv: Sequence[str], callbacks: Sequence[Callback] = ()) -> Trainer:
    """Train a detector with the settings in a YAML."""
    return detect(load_detect_config(argv), callbacks)


if __name__ == "__main__":
    command_line.run(main)
