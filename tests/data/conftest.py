"""Fixtures of the data's tests."""

from collections.abc import Iterator

import pytest
import torch

from d2v_composer.system import retry


@pytest.fixture(autouse=True)
def no_process_group() -> Iterator[None]:
    """Hide the process group of another test: a forked process lacks its threads, and would hang in a collective."""
    member = torch.distributed.distributed_c10d.GroupMember
    before = member.WORLD
    member.WORLD = None
    yield
    member.WORLD = before


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry after hundredths of a second."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
