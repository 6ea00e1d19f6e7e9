"""recipes/train.py whose uploads run in forked processes; each of seven spawned ones would import torch first."""

import multiprocessing
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from d2v_composer.system import command_line, third_party
from recipes import train

if __name__ == "__main__":
    third_party.SPAWN = multiprocessing.get_context("fork")
    command_line.run(train.main)
