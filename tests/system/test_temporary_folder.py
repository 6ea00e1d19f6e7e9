"""A run's temporary files and sockets have a folder."""

import errno
import multiprocessing
import multiprocessing.util
import os
import tempfile
from multiprocessing.connection import Connection
from multiprocessing.process import current_process
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from d2v_composer.system import files
from d2v_composer.system.errors import InputError
from d2v_composer.system.files import PREFIX, use_temporary_folder
from helpers import time_limit

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def long_folder(tmp_path: Path) -> Path:
    """A folder with a path too long for sockets."""
    folder = tmp_path / ("a" * 100)
    folder.mkdir()
    return folder


def use_workers(folder: Path, send: Connection) -> None:
    tempfile.tempdir = str(folder)
    current_process()._config.pop("tempdir", None)  # pyright: ignore[reportAttributeAccessIssue]
    use_temporary_folder()
    with time_limit(20):
        batches = list(DataLoader([torch.zeros(3)] * 8, batch_size=2, num_workers=1))  # pyright: ignore[reportArgumentType]
    send.send((len(batches), tempfile.gettempdir(), multiprocessing.util.get_temp_dir()))


def test_sockets_get_a_shorter_folder_than_a_long_tmpdir(long_folder: Path) -> None:
    """Workers send tensors through sockets; with a longer path the loader would hang."""
    receive, send = FORK.Pipe(duplex=False)
    run = FORK.Process(target=use_workers, args=(long_folder, send))
    run.start()
    send.close()
    num_batches, temporary, sockets = receive.recv()
    assert num_batches == 4
    assert Path(temporary).parent == long_folder
    assert len(sockets) < 60
    run.join()
    assert run.exitcode == 0
    assert [path.name for path in long_folder.iterdir()] == [f"{PREFIX}scratch.lock"]
    assert not Path(sockets).parent.exists()


def test_the_folder_of_a_living_run_stays_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr("multiprocessing.util.Finalize", lambda *arguments, **options: None)  # in this process
    monkeypatch.setenv("MASTER_PORT", "1")
    first = files._enter(tmp_path)
    monkeypatch.setenv("MASTER_PORT", "2")
    second = files._enter(tmp_path)
    assert first is not None
    assert second is not None
    assert first != second
    assert first.is_dir()
    files._sweep(tmp_path)
    assert first.is_dir()


def test_a_long_tmpdir_without_a_shorter_folder_is_refused(long_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SHORT_FOLDERS", (str(long_folder / "no-such-folder"),))
    monkeypatch.setattr(tempfile, "tempdir", str(long_folder / f"{PREFIX}of-a-parent"))
    environment = dict(os.environ)
    with pytest.raises(InputError, match=r"^TMPDIR: must have at most 70 characters if none of .*, got \d{3}: /"):
        use_temporary_folder()
    assert dict(os.environ) == environment
