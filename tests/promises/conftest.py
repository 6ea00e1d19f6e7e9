"""Fixtures of several promises."""

from pathlib import Path

import pytest
from small_runs import Run


@pytest.fixture
def run(small_data: Path, tmp_path: Path) -> Run:
    """A run that has not begun."""
    return Run(tmp_path / "run", small_data)
