"""The order of the tests; what they share is in ``shared_fixtures.py``."""

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

# Those with the longest tests.
LONG_FILES = (
    "test_data.py",
    "test_run.py",
    "test_files.py",
    "test_commands.py",
    "test_run_store.py",
    "test_run_ranks.py",
    "test_loggers.py",
    "test_finetune.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let both processes, each of which gets a half of the tests, end with short ones."""
    first, second = (
        [item for name in names for item in items if item.path.name == name]
        for names in (LONG_FILES[::2], LONG_FILES[1::2])
    )
    short = [item for item in items if item.path.name not in LONG_FILES]
    middle = max(0, len(items) // 2 - len(first))
    items[:] = [*first, *short[:middle], *second, *short[middle:]]


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, except in the process that only hands the tests out: their imports take seconds.

    Without the extra 'train', whose packages they import, the core's tests run: they need none.
    """
    hands_out = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if not hands_out and find_spec("composer") is not None:
        config.pluginmanager.import_plugin("shared_fixtures")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for torch, as in the programs that tests start, so that runs in this process give the same bits."""
    import torch  # takes seconds, which the process that hands the tests out does not need

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
