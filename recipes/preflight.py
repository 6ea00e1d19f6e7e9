"""Rehearse a run, with the run's own arguments.

usage: composer recipes/preflight.py FILE.yaml [dotted.key=value …]

    composer recipes/preflight.py yamls/quickstart.yaml
    composer recipes/preflight.py yamls/distill.yaml train_loader.remote=s3://BUCKET/imagenet/train
    composer recipes/preflight.py yamls/distill.yaml save_folder=s3://BUCKET/runs/distill precision=amp_bf16

In minutes, it checks packages, GPUs, teacher, data set, disk space and permissions; starts the run with every callback
at every batch, stops it by SIGTERM, resumes it and exports its student, all in folders of its own, which it removes.
It prints a table of checks, and what the whole run will need. The status is 0 only if all checks passed.
yamls/README.md describes every field.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from d2v_composer.system import command_line

if __name__ == "__main__":
    command_line.begin(__doc__)

from composer.utils import dist

from d2v_composer.config.load import load_config
from d2v_composer.preflight import preflight
from d2v_composer.system.command_line import print_next


def main(argv: Sequence[str]) -> None:
    """Rehearse in one process of each node, which starts the other ranks."""
    if dist.get_local_rank() != 0:
        return
    train = Path(__file__).with_name("train.py")
    if not preflight(argv, load_config(argv), train):
        sys.exit(1)
    ranks = dist.get_local_world_size()
    if ranks < dist.get_world_size():
        print_next("on each node, the same command with train.py")
    else:
        print_next(shlex.join(["composer", "-n", str(ranks), str(train), *argv]))


if __name__ == "__main__":
    command_line.run(main)
