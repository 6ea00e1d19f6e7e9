"""Fixtures of the data's tests."""

import pytest

from d2v_composer.system import retry


@pytest.fixture(autouse=True)
def forks_have_no_process_group(no_process_group: None) -> None:
    """Tests here fork data workers."""


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry after hundredths of a second."""
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
