"""recipes/train.py with a count of torch.compile's graphs: ``count_graphs.py BACKEND FOLDER RUN's arguments``.

After each batch and its retrieval, each rank writes a line to its file in FOLDER: graphs and graph breaks.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from composer import Callback, Logger, State
from composer.utils import dist
from torch._dynamo.utils import counters

sys.path.insert(0, str(Path(__file__).parents[2]))
from d2v_composer.system import command_line
from recipes import train


class CountGraphs(Callback):
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / str(dist.get_global_rank())

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        with self.path.open("a") as file:
            file.write(f"{counters['stats']['unique_graphs']} {sum(counters['graph_break'].values())}\n")


def main(argv: Sequence[str]) -> None:
    backend, folder, *arguments = argv
    torch.compile = partial(torch.compile, backend=backend)
    train.main(arguments, [CountGraphs(Path(folder))])


if __name__ == "__main__":
    command_line.run(main)
