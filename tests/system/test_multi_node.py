"""Ranks wait for a leader as long as its work takes, and stop when it fails."""

import datetime
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from composer.utils import dist

from d2v_composer.system import ranks
from d2v_composer.system.errors import InputError
from d2v_composer.system.ranks import node_leaders_first, rank_zero_first
from helpers import free_port

FORK = multiprocessing.get_context("fork")

COLLECTIVE_SECONDS = 2.0

pytestmark = pytest.mark.usefixtures("no_process_group")

LeadersFirst = Callable[[str], AbstractContextManager[None]]


def run_ranks(folder: Path, rank_of: Callable[[], None], store: str = "") -> Sequence[BaseProcess]:
    """Start two ranks of one node, with a short collective timeout and a store in a file, or at an address."""
    arguments = (folder, store or f"file://{folder}/store", rank_of)
    ranks = [FORK.Process(target=_run_rank, args=(number, *arguments)) for number in (0, 1)]
    for rank in ranks:
        rank.start()
    return ranks


def _run_rank(number: int, folder: Path, store: str, rank_of: Callable[[], None]) -> None:
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.distributed.init_process_group(
        "gloo",
        init_method=store,
        rank=number,
        world_size=2,
        timeout=datetime.timedelta(seconds=COLLECTIVE_SECONDS),
    )
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


def _download_longer_than_the_timeout_of_a_collective(leaders_first: LeadersFirst) -> None:
    with leaders_first("the teacher"):
        if dist.get_local_rank() == 0:
            time.sleep(1.5 * COLLECTIVE_SECONDS)
    dist.barrier()


def test_ranks_wait_longer_for_a_download_than_for_a_collective(tmp_path: Path) -> None:
    runs = []
    for leaders_first in (node_leaders_first, rank_zero_first):
        folder = tmp_path / leaders_first.__name__
        folder.mkdir()
        runs.append(run_ranks(folder, partial(_download_longer_than_the_timeout_of_a_collective, leaders_first)))
    assert [ended(run) for run in runs] == [[0, 0], [0, 0]]


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
def test_waiting_ranks_stop_when_a_leader_fails(tmp_path: Path, rank_of: Callable[[], None], message: str) -> None:
    assert ended(run_ranks(tmp_path, rank_of)) == [3, 3]
    assert (tmp_path / "1.txt").read_text() == message


def _refuse_before_the_other_looks() -> None:
    if dist.get_local_rank() == 1:
        time.sleep(0.5)
    with rank_zero_first("the loggers"):
        raise InputError("loggers.wandb: no login")


def test_rank_zero_keeps_its_store_until_the_reason_was_read(tmp_path: Path) -> None:
    ranks = run_ranks(tmp_path, _refuse_before_the_other_looks, f"tcp://127.0.0.1:{free_port()}")
    assert ended(ranks) == [3, 3]
    assert (tmp_path / "1.txt").read_text() == (tmp_path / "0.txt").read_text() == "InputError: loggers.wandb: no login"


def _be_killed() -> None:
    ranks.BEAT_SECONDS, ranks.SILENT_SECONDS = 0.1, 1.0
    with node_leaders_first("the teacher"):
        if dist.get_local_rank() == 0:
            time.sleep(1.5)  # with a heartbeat
            os.kill(os.getpid(), signal.SIGKILL)


def test_waiting_ranks_stop_after_a_leader_is_killed(tmp_path: Path) -> None:
    """On another node, say: Composer's launcher ends the ranks of its own node."""
    assert ended(run_ranks(tmp_path, _be_killed)) == [-signal.SIGKILL, 3]
    message = "RuntimeError: the teacher: rank 0 has not responded for 1 s"
    assert (tmp_path / "1.txt").read_text() == message


def test_a_single_process_does_not_wait() -> None:
    for wait in (node_leaders_first, rank_zero_first):
        with pytest.raises(InputError, match=r"^the same$"), wait("the teacher"):
            raise InputError("the same")
