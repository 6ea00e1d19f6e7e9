"""recipes/train.py whose uploads run in forked processes; each of seven spawned ones would import torch first."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from d2v_composer.system import cli, compat, worker_lifetime
from recipes import train

if __name__ == "__main__":
    compat.SPAWN = worker_lifetime.FORK
    cli.run(train.main)
