"""Rehearse a run: ``composer recipes/preflight.py FILE.yaml [dotted.key=value …]``, with the run's own arguments.

In minutes, it checks packages, GPUs, teacher, data set, disk space and permissions; starts the run with every callback
at every batch, stops it by SIGTERM, resumes it and exports its student, all in folders of its own, which it removes.
It prints a table of checks, and what the whole run will need. The status is 0 only if all checks passed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from composer.utils import dist

from d2v_composer.config.load import load_config
from d2v_composer.preflight import preflight
from d2v_composer.system import cli


def main(argv: Sequence[str]) -> None:
    """Rehearse in one process of each node, which starts the other ranks."""
    if dist.get_local_rank() != 0:
        return
    if not preflight(argv, load_config(argv), Path(__file__).with_name("train.py")):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
