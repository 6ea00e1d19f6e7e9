"""Fixtures of the tests of sources."""

import pytest


@pytest.fixture(autouse=True)
def forks_have_no_process_group_and_pauses_are_short(no_process_group: None, short_pauses: None) -> None:
    """Tests here fork data workers, and retry."""
