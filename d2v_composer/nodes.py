"""Nodes of one run that share a machine, or a folder: what Composer names alike for all of them."""

import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from composer.utils import dist

__all__ = ["NodePlace", "find_node_place", "separate_signal_files"]


class NodePlace(NamedTuple):
    """Which of a run's nodes on this machine the process belongs to."""

    number: int
    num_nodes: int


def find_node_place() -> NodePlace:
    """Ask all ranks of the run; 0 of 1 where each node is a machine, or there is but one process."""
    this = (platform.node(), dist.get_node_rank())
    nodes_here = sorted({node for machine, node in dist.all_gather_object(this) if machine == this[0]})
    return NodePlace(nodes_here.index(this[1]), len(nodes_here))


@contextmanager
def separate_signal_files() -> Iterator[None]:
    """Give each node its own of the files with which its first rank calls the others, and which it then deletes.

    Composer 0.32 gives all nodes rank 0's name: in a folder that they share, each deletes the others' file.
    """
    common_name = dist.get_node_signal_file_name

    def name_of_this_node(rng: random.Random | None = None) -> str:
        return f"{common_name(rng)}_{dist.get_node_rank()}"

    dist.get_node_signal_file_name = name_of_this_node
    try:
        yield
    finally:
        dist.get_node_signal_file_name = common_name
