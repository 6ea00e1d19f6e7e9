"""Ranks wait for a leader as long as its work takes, and stop when it fails."""

import datetime
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from composer.utils import dist

from d2v_composer.system import ranks
from d2v_composer.system.errors import InputError
from d2v_composer.system.ranks import node_leaders_first, rank_zero_first
from helpers import free_port

FORK = multiprocessing.get_context("fork")
COLLECTIVE_SECONDS = 1.0

pytestmark = pytest.mark.usefixtures("no_process_group")


def statuses(folder: Path, rank_of: Callable[[], None], store: str = "") -> list[int | None]:
    """Run two ranks of one node, with a short collective timeout and a store in a file, or at an address."""
    arguments = (folder, store or f"file://{folder}/store", rank_of)
    ranks = [FORK.Process(target=_run_rank, args=(number, *arguments)) for number in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    return [rank.exitcode for rank in ranks]


def _run_rank(number: int, folder: Path, store: str, rank_of: Callable[[], None]) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    timeout = datetime.timedelta(seconds=COLLECTIVE_SECONDS)
    torch.distributed.init_process_group("gloo", init_method=store, rank=number, world_size=2, timeout=timeout)
    ranks.FAREWELL_SECONDS = 1.0
    dist.barrier()
    try:
        rank_of()
    except (InputError, RuntimeError) as error:
        (folder / f"{number}.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(3)


def _download_longer_than_the_timeout_of_a_collective() -> None:
    with node_leaders_first("the teacher"):
        if dist.get_local_rank() == 0:
            time.sleep(1.5 * COLLECTIVE_SECONDS)
    dist.barrier()


def test_ranks_wait_longer_for_a_download_than_for_a_collective(tmp_path: Path) -> None:
    assert statuses(tmp_path, _download_longer_than_the_timeout_of_a_collective) == [0, 0]


def _fail() -> None:
    with node_leaders_first("the teacher"):
        if dist.get_local_rank() == 0:
            raise RuntimeError("no route to host")


def _refuse_before_the_other_looks() -> None:
    if dist.get_local_rank() == 1:
        time.sleep(0.5)
    with rank_zero_first("the loggers"):
        raise InputError("loggers.wandb: no login")


@pytest.mark.parametrize(
    ("rank_of", "message"),
    [
        (_fail, "RuntimeError: the teacher: rank 0 failed: no route to host"),
        (_refuse_before_the_other_looks, "InputError: loggers.wandb: no login"),
    ],
)
def test_waiting_ranks_stop_when_a_leader_fails(tmp_path: Path, rank_of: Callable[[], None], message: str) -> None:
    """Rank 0 keeps its store until the reason was read."""
    assert statuses(tmp_path, rank_of, f"tcp://127.0.0.1:{free_port()}") == [3, 3]
    assert (tmp_path / "1.txt").read_text() == message


def _be_killed() -> None:
    ranks.BEAT_SECONDS, ranks.SILENT_SECONDS = 0.1, 1.0
    with node_leaders_first("the teacher"):
        if dist.get_local_rank() == 0:
            time.sleep(1.5)  # with a heartbeat
            os.kill(os.getpid(), signal.SIGKILL)


def test_waiting_ranks_stop_after_a_leader_is_killed(tmp_path: Path) -> None:
    """On another node, say: Composer's launcher ends the ranks of its own node."""
    assert statuses(tmp_path, _be_killed) == [-signal.SIGKILL, 3]
    assert (tmp_path / "1.txt").read_text() == "RuntimeError: the teacher: rank 0 has not responded for 1 s"
