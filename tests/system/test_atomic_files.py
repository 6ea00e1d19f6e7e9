"""Files appear complete, or not at all."""

import contextlib
import errno
import os
import stat
from pathlib import Path

import pytest

from d2v_composer.system.errors import InputError
from d2v_composer.system.files import check_out_file, find_partials, out_file, partial_file, write_atomically


def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "shard[0].mds"
    write_atomically(path, "old")
    with contextlib.suppress(KeyboardInterrupt), partial_file(path) as partial:
        partial.write_text("half")
        partial.with_name(f"{partial.name}.tmp").write_text("of a downloader")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with partial_file(path) as first, partial_file(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # renamed last
    assert list(tmp_path.iterdir()) == [path]


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


def test_a_fault_of_the_disk_is_one_line(tmp_path: Path) -> None:
    message = rf"^{tmp_path}/file: cannot be written \(No space left on device\)$"
    with pytest.raises(InputError, match=message), out_file(tmp_path / "file"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_partial_file_is_found_by_its_file_alone(tmp_path: Path) -> None:
    path, other = tmp_path / "ep0-ba1-rank0.pt", tmp_path / "other.pt"
    with partial_file(path) as partial, partial_file(other) as others:
        partial.touch()
        others.touch()
        assert list(find_partials([path])) == [partial]
        assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("folder", "is a folder, expected a file to write"),
        ("file/x.npy", "file is not a folder"),
        ("/proc/x.npy", r"/proc/x\.npy: cannot be written: /proc is not writable \("),
        ("/proc/new/x.npy", r"/proc/new/x\.npy: cannot be written: /proc is not writable \("),
        ("s3://bucket/x.npy", "must be a local file"),
        ("s3://bucket/x?y.npy", "must be a local file"),
    ],
)
def test_refuses_what_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=message):
        check_out_file(Path(path))
