"""Record what a command and all its children do to the files below a folder, by strace.

strace prints each system call with its data, and each descriptor with the path that it has at that moment. Only the
position in a file is missing; it is followed through opening, reading, seeking, copies of descriptors and forks.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

# Not sync_file_range: it guarantees nothing.
CALLS = (
    "open,openat,creat,close,dup,dup2,dup3,fcntl,lseek,read,readv,write,writev,pwrite64,pwritev,truncate,ftruncate,"
    "fallocate,rename,renameat,renameat2,link,linkat,symlink,symlinkat,unlink,unlinkat,rmdir,mkdir,mkdirat,fsync,"
    "fdatasync,sync,syncfs,mmap,sendfile,copy_file_range,chdir,fchdir,clone,clone3,fork,vfork"
)
# What tells variants of a call apart; they do the same to a file.
VARIANT = re.compile(r"(?<!^cre)(at2?|64|[23])$")
FORKS = ("clone", "fork", "vfork")
# What it prints: hexadecimal text, so that no path or content has a quote or a bracket; data of any size; paths.
STRACE = ("strace", "-f", "--seccomp-bpf", "-qq", "-y", "-xx", "-s", str(1 << 29), "-e", "raw=read,readv")
STARTED = re.compile(r"(\d+) +(\w+)\((.*)")
UNFINISHED = " <unfinished ...>"
RESUMED = re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)")
ENDED = re.compile(r"(.*)\) += (0x[0-9a-f]+|\d+)(?:<([^>]*)>(\(deleted\))?)?")
DESCRIPTOR = re.compile(r"(\d+|AT_FDCWD)<([^>]*)>(\(deleted\))?")
TEXT = re.compile(r'"([^"]*)"')

# They change a file without data of theirs; so does a shared mapping.
UNSEEN = ("fallocate", "sendfile", "copy_file_range")
# No command calls them: all relative paths would be of another folder; all files would be safe.
UNKNOWN = ("chdir", "fchdir", "sync", "syncfs")

IS_AVAILABLE = shutil.which("strace") is not None and (
    subprocess.run([*STRACE, "-o", os.devnull, "true"], capture_output=True).returncode == 0  # ptrace may be forbidden
)


class Operation(NamedTuple):
    """An effect of a system call on a file or folder."""

    kind: str
    """create (unless it exists), mkdir, symlink, link, rename, remove, write, resize, or sync."""
    path: str = ""
    """Relative to the recorded folder; ``.`` is that folder."""
    other: str = ""
    """The new path of a rename or a link; the target of a symlink, as it was given."""
    size: int = 0
    """The new size; the offset of a write, -1 to append."""
    data: bytes = b""

    def __str__(self) -> str:
        amount = f" {len(self.data)} bytes at {self.size}" if self.kind == "write" else ""
        return f"{self.kind} {self.path}{f' → {self.other}' if self.other else ''}{amount}"


@dataclass
class OpenFile:
    """An open file description, which descriptors and processes may share."""

    appends: bool = False
    position: int = 0


def record(command: Sequence[str | Path], folder: Path, log: Path, **options: object) -> list[Operation]:
    """Run a command, which must succeed, and return the operations below a folder in the order of their ends.

    Args:
        command: The program and its arguments.
        folder: Without symlinks in its path.
        log: A file for strace's output.
        **options: Those of :func:`subprocess.run`.
    """
    arguments = [*STRACE, "-o", log, "-e", f"trace={CALLS}", *command]
    ended = subprocess.run(list(map(str, arguments)), capture_output=True, text=True, **options)  # pyright: ignore
    assert ended.returncode == 0, ended.stdout + ended.stderr
    with log.open() as lines:
        return [*Reader(folder, Path(str(options.get("cwd", ".")))).read(lines)]


class Call(NamedTuple):
    """A system call that succeeded."""

    pid: int
    """The process or the thread."""
    name: str
    arguments: str
    """As strace printed them."""
    returned: int
    opened: str
    """The path of a returned descriptor; empty if it has none."""


class Reader:
    """Reads strace's output.

    Args:
        folder: The recorded folder.
        cwd: Where the command starts, and stays.
    """

    def __init__(self, folder: Path, cwd: Path) -> None:
        self.folder, self.cwd = str(folder), str(cwd.resolve())
        self.tables: dict[int, dict[int, OpenFile]] = {}
        """Process or thread → its descriptors; threads share them."""
        self.unfinished: dict[int, tuple[str, str]] = {}
        """Process or thread → the call in which it is, and that call's arguments."""

    def read(self, lines: Iterator[str]) -> Iterator[Operation]:
        for line in lines:
            if match := STARTED.match(line):
                pid, name, rest = int(match[1]), VARIANT.sub("", match[2]), match[3]
                if rest.endswith(UNFINISHED):
                    self.unfinished[pid] = name, rest.removesuffix(UNFINISHED)
                    continue
            elif match := RESUMED.match(line):
                pid = int(match[1])
                name, before = self.unfinished.pop(pid)
                rest = before + match[2]
            else:
                continue  # a signal, or an exit
            if ended := ENDED.match(rest):  # else it failed
                opened = "" if ended[4] else text_of(ended[3] or "")
                yield from self.interpret(Call(pid, name, ended[1], int(ended[2], 0), opened))

    def interpret(self, call: Call) -> Iterator[Operation]:
        """Follow the descriptors through a call, and yield what it did to files."""
        _, name, arguments, returned, opened = call
        table = self.table_of(call.pid)
        if name in FORKS:
            self.tables.setdefault(returned, table if "CLONE_FILES" in arguments else {**table})
        elif name in ("open", "creat"):
            table[returned] = OpenFile("O_APPEND" in arguments)
            if path := self.inside(opened):
                if name == "creat" or "O_CREAT" in arguments:
                    yield Operation("create", path)
                if name == "creat" or "O_TRUNC" in arguments:
                    yield Operation("resize", path)
        elif name in ("rename", "link"):
            old, new = self.named(arguments)
            if (old is None) != (new is None):
                raise NotImplementedError(f"{name} {old} → {new}: into the recorded folder, or out of it")
            if old and new:
                yield Operation(name, old, new)
        elif name in ("symlink", "mkdir", "unlink", "rmdir", "truncate"):
            if path := self.named(arguments)[-1]:
                yield changed(name, arguments, path)
        elif name in UNKNOWN:
            raise NotImplementedError(name)
        elif name in ("read", "readv"):
            self.file_of(call.pid, int(arguments.partition(",")[0], 16)).position += returned
        elif descriptor := DESCRIPTOR.search(arguments):
            path = None if descriptor[3] else self.inside(text_of(descriptor[2]))
            yield from self.used(call, int(descriptor[1]), path)

    def used(self, call: Call, descriptor: int, path: str | None) -> Iterator[Operation]:
        """Interpret a call on an open descriptor, of a file at this path if it is inside."""
        pid, name, arguments, returned, _ = call
        table, file = self.table_of(pid), self.file_of(pid, descriptor)
        if name == "dup" or (name == "fcntl" and "F_DUPFD" in arguments):
            table[returned] = file
        elif name == "close":
            table.pop(descriptor, None)
        elif name == "lseek":
            file.position = returned
        elif name in ("write", "writev", "pwrite", "pwritev"):
            place = int(arguments.rpartition(",")[2]) if name.startswith("p") else file.position
            if not name.startswith("p"):
                file.position += returned
            if path:
                data = b"".join(map(decoded, TEXT.findall(arguments)))[:returned]
                yield Operation("write", path, size=-1 if file.appends else place, data=data)
        elif name == "ftruncate" and path:
            yield changed(name, arguments, path)
        elif name in ("fsync", "fdatasync") and path:
            yield Operation("sync", path)
        elif (name in UNSEEN or ("PROT_WRITE" in arguments and "MAP_SHARED" in arguments)) and any(
            self.inside(text_of(printed)) for _, printed, _ in DESCRIPTOR.findall(arguments)
        ):
            raise NotImplementedError(f"{name} {path}: strace does not see its data")

    def table_of(self, pid: int) -> dict[int, OpenFile]:
        """Return the descriptors of a process, which may print before the call that starts it has ended."""
        if pid not in self.tables:
            starts = [(parent, call) for parent, call in self.unfinished.items() if call[0] in FORKS]
            parent, (_, arguments) = starts[-1] if starts else (0, ("", ""))
            theirs = self.tables.get(parent, {})
            self.tables[pid] = theirs if "CLONE_FILES" in arguments else {**theirs}
        return self.tables[pid]

    def file_of(self, pid: int, descriptor: int) -> OpenFile:
        return self.table_of(pid).setdefault(descriptor, OpenFile())

    def named(self, arguments: str) -> list[str | None]:
        """Return the paths that a call names, each relative to the descriptor before it, if there is one."""
        paths, base = [], self.cwd
        for match in re.finditer(f"{DESCRIPTOR.pattern}|{TEXT.pattern}", arguments):
            if match[4] is None:
                base = text_of(match[2])
            else:
                paths.append(self.inside(os.path.normpath(os.path.join(base, text_of(match[4])))))
        return paths

    def inside(self, path: str) -> str | None:
        """Return a path relative to the recorded folder; ``None`` if it is outside."""
        if path == self.folder:
            return "."
        return path.removeprefix(f"{self.folder}/") if path.startswith(f"{self.folder}/") else None


def changed(name: str, arguments: str, path: str) -> Operation:
    """Return what a call has done to a path."""
    if name == "symlink":
        return Operation("symlink", path, text_of(TEXT.findall(arguments)[0]))
    if name in ("truncate", "ftruncate"):
        return Operation("resize", path, size=int(arguments.rpartition(",")[2]))
    return Operation("mkdir" if name == "mkdir" else "remove", path)


def decoded(printed: str) -> bytes:
    return bytes.fromhex(printed.replace("\\x", ""))


def text_of(printed: str) -> str:
    return decoded(printed).decode(errors="replace")
