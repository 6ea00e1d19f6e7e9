"""The order of the tests; what they share is in ``shared_fixtures.py``."""

import gc
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from programs.preloaded import start_server

SERVER = pytest.StashKey[subprocess.Popen[bytes]]()
FORKED = Path(__file__).parent / "programs" / "forked.py"

# The files that take longest.
LONG_FILES = (
    "test_run.py",
    "test_commands.py",
    "test_data.py",
    "test_distill.py",
    "test_outputs.py",
    "test_export.py",
    "test_files.py",
    "test_run_store.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let each process, which gets an equal share of the tests, begin with long ones and end with short ones."""
    num_processes = getattr(config, "workerinput", {}).get("workercount", 1)
    short, ordered = [item for item in items if item.path.name not in LONG_FILES], list[pytest.Item]()
    for number in range(num_processes):
        names = LONG_FILES[number::num_processes]
        ordered += [item for name in names for item in items if item.path.name == name]
        count = max(0, len(items) * (number + 1) // num_processes - len(ordered))
        ordered += short[:count]
        del short[:count]
    items[:] = [*ordered, *short]


def pytest_collection_finish() -> None:
    """Collect garbage from now on, but not among what the tests have imported; both save seconds."""
    gc.freeze()
    gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures, except in the process that only hands the tests out: their imports take seconds.

    Without the extra 'train', whose packages they import, the core's tests run: they need none.
    """
    if find_spec("composer") is None:
        return
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        config.stash[SERVER] = start_server()
        return
    gc.disable()
    with suppress(ImportError):  # timm imports it, which takes seconds longer when many modules are there already
        import_module("wandb")
    config.pluginmanager.import_plugin("shared_fixtures")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Fork each test process from the server: its imports take seconds, too."""
    for spec in specs if SERVER in config.stash else ():
        spec.python = shlex.join([sys.executable, str(FORKED)])


def pytest_unconfigure(config: pytest.Config) -> None:
    if (server := config.stash.get(SERVER, None)) is not None:
        server.communicate()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for torch, as in the programs that tests start, so that runs in this process give the same bits."""
    import torch  # takes seconds, which the process that hands the tests out does not need

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
