"""Warnings of other packages that no user can act on: each with its source and the reason to hide it."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from composer.loggers import remote_uploader_downloader
from composer.utils import checkpoint, dist, remote_uploader

from d2v_composer.system.processes import SPAWN

# MERGED FROM d2v_composer/system/third_party.py: Changes to the insides of other packages, each with the version


@contextmanager
def patched_composer(read_checkpoint: Callable[..., Any]) -> Iterator[None]:
    """Apply the patches of Composer to a Trainer that is constructed within the block.

    Args:
        read_checkpoint: Loads a checkpoint, given its path and, by keyword, torch.load's ``map_location``.
    """
    multiprocessing_of_uploads = SimpleNamespace(get_context=lambda method: SPAWN)
    common_name = dist.get_node_signal_file_name

    def name_of_this_node(rng: random.Random | None = None) -> str:
        return f"{common_name(rng)}_{dist.get_node_rank()}"

    with (
        patch.object(remote_uploader, "multiprocessing", multiprocessing_of_uploads),
        patch.object(remote_uploader_downloader, "multiprocessing", multiprocessing_of_uploads),
        patch.object(dist, "get_node_signal_file_name", name_of_this_node),
        patch.object(checkpoint, "_torch_load_with_validation", read_checkpoint),
    ):
        yield
