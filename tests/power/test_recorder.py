"""The recorder writes down what happened, and nothing else."""

import sys
from pathlib import Path

import pytest

from power.recorder import IS_AVAILABLE, record
from power.replayer import read_tree, replay

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
