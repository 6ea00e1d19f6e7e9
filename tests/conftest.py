"""The order of the tests; what they share is in ``shared_fixtures.py``."""

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
    """Load the fixtures, except in the process that only hands the tests out: their imports take seconds."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")
