"""Ranks that wait for one of them: as long as it takes, and not when it has failed."""

import datetime
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from composer.utils import dist

from d2v_composer.system import multi_node
from d2v_composer.system.errors import InputError
from d2v_composer.system.multi_node import node_leaders_first, rank_zero_first
from d2v_composer.system.worker_lifetime import FORK

COLLECTIVE_SECONDS = 2.0


def run_ranks(folder: Path, rank_of: Callable[[], None]) -> Sequence[BaseProcess]:
    """Two processes of one node, whose collectives time out soon."""
    ranks = [FORK.Process(target=_run_rank, args=(folder, number, rank_of)) for number in (0, 1)]
    for rank in ranks:
        rank.start()
    return ranks


def _run_rank(folder: Path, number: int, rank_of: Callable[[], None]) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=number,
        world_size=2,
        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
    )
    multi_node._node_leaders.cache_clear()
    dist.barrier()
    try:
        rank_of()
    except (InputError, RuntimeError) as error:
        (folder / f"{number}.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(3)


def ended(ranks: Sequence[BaseProcess], seconds: float = 60) -> list[int | None]:
    for rank in ranks:
        rank.join(seconds)
    return [rank.exitcode for rank in ranks]


def _download_longer_than_a_collective_may_take() -> None:
    for wait in (node_leaders_first, rank_zero_first):
        with wait("the teacher"):
            if dist.get_local_rank() == 0:
                time.sleep(1.5 * COLLECTIVE_SECONDS)
        dist.barrier()


def test_others_wait_for_a_download_longer_than_for_a_collective(tmp_path: Path) -> None:
    assert ended(run_ranks(tmp_path, _download_longer_than_a_collective_may_take)) == [0, 0]


def _refuse_the_input() -> None:
    with node_leaders_first("the teacher"):
        if dist.get_local_rank() == 0:
            raise InputError("teacher.pt: no such file")


def _fail() -> None:
    with node_leaders_first("the teacher"):
        if dist.get_local_rank() == 0:
            raise RuntimeError("no route to host")


@pytest.mark.parametrize(
    ("rank_of", "message"),
    [
        (_refuse_the_input, "InputError: teacher.pt: no such file"),
        (_fail, "RuntimeError: the teacher: rank 0 failed: no route to host"),
    ],
)
def test_a_rank_that_fails_is_not_waited_for(tmp_path: Path, rank_of: Callable[[], None], message: str) -> None:
    assert ended(run_ranks(tmp_path, rank_of)) == [3, 3]
    assert (tmp_path / "1.txt").read_text() == message


def _be_killed() -> None:
    multi_node.BEAT_SECONDS, multi_node.SILENT_SECONDS = 0.1, 2.0
    with node_leaders_first("the teacher"):
        if dist.get_local_rank() == 0:
            time.sleep(3.0)  # it is alive
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_is_killed_is_given_up(tmp_path: Path) -> None:
    """On another node, say: Composer's launcher ends the ranks of its own."""
    assert ended(run_ranks(tmp_path, _be_killed)) == [-signal.SIGKILL, 3]
    message = "RuntimeError: the teacher: rank 0 has given no sign of life for 2 s"
    assert (tmp_path / "1.txt").read_text() == message


def test_one_process_waits_for_nobody() -> None:
    for wait in (node_leaders_first, rank_zero_first):
        with pytest.raises(InputError, match=r"^the same$"), wait("the teacher"):
            raise InputError("the same")
