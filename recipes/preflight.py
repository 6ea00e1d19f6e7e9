"""Try a run before it starts: check the data, train a few batches, stop, resume and export.

usage: composer recipes/preflight.py FILE.yaml [dotted.key=value …]

    composer recipes/preflight.py yamls/quickstart.yaml
    composer recipes/preflight.py yamls/distill.yaml train_loader.remote=s3://BUCKET/imagenet/train

The program prints a table of checks. If all checks pass, the program also prints what the whole run will need, and the
exit status is 0.
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
from d2v_composer.runs.preflight import preflight
from d2v_composer.system.errors import InputError


def main(argv: Sequence[str]) -> None:
    """Run the preflight in the process with local rank 0; the other processes return."""
    if dist.get_local_rank() != 0:
        return
    train, ranks = Path(__file__).with_name("train.py"), dist.get_local_world_size()
    if dist.get_world_size() > ranks:
        raise InputError(f"the preflight must run on one node: composer -n {ranks} recipes/preflight.py FILE.yaml …")
    if not preflight(argv, load_config(argv, needs_data=True), train):
        sys.exit(1)
    command_line.print_next(shlex.join(["composer", "-n", str(ranks), str(train), *argv]))


if __name__ == "__main__":
    command_line.run(main)
