"""The recorder writes down what happened, and the states of a crash are those of the model, no fewer and no more."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from power.recorder import IS_AVAILABLE, Operation, record
from power.replayer import Tree, crash_states, read_tree, replay

# Every kind of write: shared positions, appending, threads, forks, holes, names that move while a file is open.
PROGRAM = """
import os, sys, threading
os.chmod(".", 0o755)
folder = sys.argv[1]
os.mkdir(f"{folder}/a"); os.mkdir(f"{folder}/b")
file = os.open(f"{folder}/a/file", os.O_RDWR | os.O_CREAT)
os.write(file, b"0123456789")
os.lseek(file, 2, os.SEEK_SET)
os.read(file, 2)
os.write(os.dup(file), b"XY")  # at 4
child = os.fork()
if child == 0:
    os.write(file, b"child")
    os._exit(0)
os.waitpid(child, 0)
thread = threading.Thread(target=os.write, args=(file, b"thread"))
thread.start(); thread.join()
os.rename(f"{folder}/a/file", f"{folder}/b/moved")
os.writev(file, [b"after", b"wards"])
os.pwrite(file, b"!", 8200)
os.fsync(file)
log = os.open(f"{folder}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.write(log, b"line 1\\n")
other = os.open(f"{folder}/log", os.O_WRONLY | os.O_APPEND)
os.write(other, b"line 2\\n"); os.write(log, b"line 3\\n")
os.ftruncate(log, 10)
folders = os.open(folder, os.O_RDONLY)
os.symlink("b/moved", "pointer", dir_fd=folders)
os.link(f"{folder}/log", f"{folder}/second")
os.replace(f"{folder}/b/moved", f"{folder}/second")
os.fsync(folders)
os.unlink(f"{folder}/log")
os.write(log, b"to nobody")
open(f"{folder}/a/new", "w").write("x" * 5000)
os.rmdir(f"{folder}/b")
"""


@pytest.mark.skipif(not IS_AVAILABLE, reason="strace cannot trace here")
def test_what_is_recorded_is_what_happened(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "old").write_bytes(b"old")
    before = read_tree(folder)
    operations = record([sys.executable, "-c", PROGRAM, folder], folder, tmp_path / "log")
    [(_, disk)] = replay(before, operations, [len(operations)])
    assert disk.as_seen() == read_tree(folder)
    assert [str(operation) for operation in operations if operation.kind == "sync"] == ["sync b/moved", "sync ."]


@pytest.mark.skipif(not IS_AVAILABLE, reason="strace cannot trace here")
@pytest.mark.parametrize(
    "program", ["numpy.memmap(sys.argv[1] + '/file', mode='w+', shape=9)[:] = 1", "os.chdir(sys.argv[1])"]
)
def test_what_strace_does_not_see_is_an_error(program: str, tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError):
        record([sys.executable, "-c", f"import os, sys, numpy; {program}", tmp_path], tmp_path, tmp_path / "log")


WRITE = [Operation("create", "new"), Operation("write", "new", data=b"new"), Operation("rename", "new", "file")]
SYNC = Operation("sync", "new")
KEEP = Operation("sync", ".")


def states(before: Tree, operations: Sequence[Operation], limit: int = 1000) -> list[Tree]:
    return [state.tree for state in crash_states(before, operations, limit)]


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        (WRITE, {b"old", b"", b"\0\0\0", b"new"}),
        ([*WRITE[:2], SYNC, WRITE[2]], {b"old", b"new"}),
        ([*WRITE, KEEP, Operation("sync", "file")], {b"old", b"", b"\0\0\0", b"new"}),
    ],
)
def test_a_renamed_file_is_whole_only_if_it_was_flushed_before(
    operations: Sequence[Operation], expected: set[bytes]
) -> None:
    contents = {tree["file"] for tree in states({"file": b"old"}, operations)}
    shorter = {content for content in contents if isinstance(content, bytes) and len(content) in (1, 2)}
    assert contents - shorter == expected


@pytest.mark.parametrize(
    ("last", "expected"), [((WRITE[2], KEEP), [{"file": b"new"}]), ((WRITE[2],), [{"new": b"new"}, {"file": b"new"}])]
)
def test_a_name_stays_only_if_its_folder_was_flushed(last: Sequence[Operation], expected: list[Tree]) -> None:
    """At the end, even if an earlier moment has the same state."""
    operations = [*WRITE[:2], SYNC, *last]
    assert [state.tree for state in crash_states({}, operations) if state.number == len(operations)] == expected
    assert {(), ("new",), ("file",)} == {tuple(tree) for tree in states({}, operations)}


def test_folders_keep_their_order_and_a_move_is_whole() -> None:
    before: Tree = {"a": None, "b": None, "a/x": b"x"}
    operations = [Operation("create", "a/1"), Operation("create", "b/2"), Operation("create", "a/3")]
    names = [{*tree} - {*before} for tree in states(before, operations)]
    assert sorted(map(sorted, names)) == [[], ["a/1"], ["a/1", "a/3"], ["a/1", "a/3", "b/2"], ["a/1", "b/2"], ["b/2"]]
    moved = states(before, [Operation("create", "b/2"), Operation("rename", "a/x", "b/x")])
    assert [sorted({*tree} - {"a", "b"}) for tree in moved] == [["a/x"], ["a/x", "b/2"], ["b/2", "b/x"]]


def test_blocks_reach_the_disk_in_any_order() -> None:
    operations = [Operation("resize", "f"), Operation("write", "f", data=b"n" * 8192)]
    ends = {
        (len(content), content[:1], content[-1:])
        for tree in states({"f": b"o" * 8192}, operations, 500)
        if isinstance(content := tree["f"], bytes)
    }
    assert {(8192, b"o", b"o"), (0, b"", b""), (8192, b"n", b"n"), (8192, b"\0", b"\0")} <= ends


def test_a_log_keeps_its_flushed_lines() -> None:
    lines = [Operation("write", "log", size=-1, data=b"a\n"), Operation("sync", "log")]
    lines += [Operation("write", "log", size=-1, data=b"b\n")]
    contents = {state.tree["log"] for state in crash_states({"log": b""}, lines) if state.number == len(lines)}
    assert {b"a\n", b"a\nb\n", b"a\n\0\0"} <= contents <= {b"a\n", b"a\nb", b"a\nb\n", b"a\n\0", b"a\n\0\0"}
