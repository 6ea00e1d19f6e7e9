"""Files appear complete, or not at all."""

import contextlib
from pathlib import Path

import pytest

from d2v_composer.system.atomic_files import check_out_file, find_partials, partial_file, write_atomically
from d2v_composer.system.errors import InputError


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
