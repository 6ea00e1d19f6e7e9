"""Files appear complete, or not at all; a lock has one holder."""

import contextlib
import errno
import os
import stat
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest

from d2v_composer.system.errors import RunError
from d2v_composer.system.files import (
    acquire,
    find_partials,
    out_file,
    partial_file,
    sole_user,
    write_atomically,
)
from helpers import run_command


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "shard[0].mds"
    write_atomically(path, "old")
    with contextlib.suppress(KeyboardInterrupt), partial_file(path) as partial:
        partial.write_text("half")
        partial.with_name(f"{partial.name}.tmp").write_text("of a downloader")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_disk_that_fails_is_one_line_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 18: an error while writing, unlike one of opening, names no file of its own."""
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(RunError, match=rf"^{tmp_path}/file cannot be written: Input/output error$"):
        write_atomically(tmp_path / "file", "text")
    assert not [*tmp_path.iterdir()]


def test_a_result_gets_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    """Some writers give their files to the owner alone."""
    before = os.umask(0o022)
    try:
        with out_file(tmp_path / "file") as partial:
            partial.unlink()
            partial.touch(mode=0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_a_partial_file_is_found_by_its_file_alone_and_writers_do_not_meet(tmp_path: Path) -> None:
    path, other = tmp_path / "ep0-ba1-rank0.pt", tmp_path / "other.pt"
    with partial_file(path) as first, partial_file(path) as second, partial_file(other) as third:
        first.write_text("first")
        second.write_text("second")
        third.touch()
        assert {*find_partials([path])} == {first, second}
        assert not list(tmp_path.glob("*.pt"))
    assert path.read_text() == "first"  # renamed last


def test_a_lock_has_one_holder_and_others_may_wait_for_it(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"
    with sole_user(path) as first, sole_user(path) as second:
        assert (first, second) == (True, False)
    lock = acquire(path)
    assert lock is not None
    threading.Timer(0.5, lock.release).start()
    with contextlib.suppress(KeyError), sole_user(path, wait=30) as alone:
        assert alone
        raise KeyError
    with sole_user(path) as alone:
        assert alone


def test_a_file_system_without_locks_is_used_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", flock)
    with sole_user(tmp_path / "lock") as alone:
        assert alone
    assert "this file system has no locks (Function not implemented)" in caplog.text


# A DataLoader's workers and their parent pass tensors through sockets in multiprocessing's temporary folder.
LOAD = """
import torch
from torch.utils.data import DataLoader
from d2v_composer.system.files import shorten_socket_paths
shorten_socket_paths()
assert len(list(DataLoader(torch.zeros(8, 1000), 2, num_workers=1))) == 4
"""


def test_a_long_tmpdir_does_not_hang_a_data_loader(tmp_path: Path) -> None:
    long = tmp_path / ("long" * 25)
    long.mkdir()
    ended = run_command(sys.executable, "-c", LOAD, timeout=60, environment={"TMPDIR": str(long)})
    assert ended.returncode == 0, ended.stderr
