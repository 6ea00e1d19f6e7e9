"""Nodes of one run that share a machine, or a folder: what Composer names alike for all of them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

from composer.utils import dist

from d2v_composer.errors import InputError

__all__ = ["raise_on_all_ranks", "separate_signal_files"]


def raise_on_all_ranks(fault: str | None) -> None:
    """End all ranks for a fault that one of them found; the others would wait for it.

    Raises:
        InputError: On every rank, with the first rank's fault that has one.
    """
    for each in dist.all_gather_object(fault):
        if each is not None:
            raise InputError(each)


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
