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
FORKS = ("clone", "clone3", "fork", "vfork")
# What it prints: hexadecimal text, so that no path or content has a quote or a bracket; data of any size; paths.
STRACE = ("strace", "-f", "--seccomp-bpf", "-qq", "-y", "-xx", "-s", str(1 << 29), "-e", "raw=read,readv")
STARTED = re.compile(r"(\d+) +(\w+)\((.*)")
RESUMED = re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)")
ENDED = re.compile(r"(.*)\) += (?:(0x[0-9a-f]+)|(\d+))(?:<([^>]*)>(\(deleted\))?)?")
DESCRIPTOR = re.compile(r"(\d+|AT_FDCWD)<([^>]*)>(\(deleted\))?")
TEXT = re.compile(r'"([^"]*)"')

# They change a file without data of theirs; so does a shared mapping.
UNSEEN = ("fallocate", "sendfile", "copy_file_range")

IS_AVAILABLE = shutil.which("strace") is not None and (
    subprocess.run([*STRACE, "-o", os.devnull, "true"], capture_output=True).returncode == 0  # ptrace may be forbidden
)


class Operation(NamedTuple):
    """An effect of a system call on a file or folder."""

    kind: str
    """create (unless it exists), mkdir, symlink, link, rename, remove, write, resize, or sync; sync_all has no path."""
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
                pid, name, rest = int(match[1]), match[2], match[3]
                if rest.endswith(" <unfinished ...>"):
                    self.unfinished[pid] = name, rest.removesuffix(" <unfinished ...>")
                    continue
            elif match := RESUMED.match(line):
                pid = int(match[1])
                name, before = self.unfinished.pop(pid)
                rest = before + match[2]
            else:
                continue  # a signal, or an exit
            if ended := ENDED.match(rest):  # else it failed
                returned = int(ended[2], 16) if ended[2] else int(ended[3])
                opened = None if ended[5] else ended[4]
                yield from self.interpret(pid, name, ended[1], returned, opened)

    def interpret(self, pid: int, name: str, arguments: str, returned: int, opened: str | None) -> Iterator[Operation]:
        """Follow the descriptors through a call, and yield what it did to files.

        Args:
            pid: Of the process or the thread.
            name: Of the call.
            arguments: As strace printed them.
            returned: Its result.
            opened: The path of a returned descriptor, unless it has none.
        """
        table = self.table_of(pid)
        if name in FORKS:
            self.tables.setdefault(returned, table if "CLONE_FILES" in arguments else {**table})
        elif name in ("open", "openat", "creat"):
            table[returned] = OpenFile("O_APPEND" in arguments)
            if path := self.inside(opened):
                if name == "creat" or "O_CREAT" in arguments:
                    yield Operation("create", path)
                if name == "creat" or "O_TRUNC" in arguments:
                    yield Operation("resize", path)
        elif name in ("rename", "renameat", "renameat2", "link", "linkat"):
            old, new = self.named(arguments)
            yield from self.moved(name, old, new)
        elif name in ("symlink", "symlinkat"):
            target, path = TEXT.findall(arguments)[0], self.named(arguments)[-1]
            if path:
                yield Operation("symlink", path, decoded(target).decode())
        elif name in ("mkdir", "mkdirat", "unlink", "unlinkat", "rmdir"):
            if path := self.named(arguments)[0]:
                yield Operation("mkdir" if name.startswith("mkdir") else "remove", path)
        elif name == "truncate":
            if path := self.named(arguments)[0]:
                yield Operation("resize", path, size=int(arguments.rpartition(",")[2]))
        elif name == "sync":
            yield Operation("sync_all")
        elif name in ("chdir", "fchdir"):
            raise NotImplementedError(f"{name}: relative paths would be of another folder")
        elif name in ("read", "readv"):
            self.file_of(pid, int(arguments.partition(",")[0], 16)).position += returned
        elif descriptor := DESCRIPTOR.search(arguments):
            file = self.file_of(pid, int(descriptor[1]))
            path = None if descriptor[3] else self.inside(descriptor[2])
            yield from self.used(name, arguments, returned, table, file, path)

    def used(
        self,
        name: str,
        arguments: str,
        returned: int,
        table: dict[int, OpenFile],
        file: OpenFile,
        path: str | None,
    ) -> Iterator[Operation]:
        """Interpret a call whose first descriptor is of this open file, at this path if it is inside."""
        if name.startswith("dup") or (name == "fcntl" and "F_DUPFD" in arguments):
            table[returned] = file
        elif name == "close":
            table.pop(int(DESCRIPTOR.match(arguments)[1]), None)  # pyright: ignore[reportOptionalSubscript]
        elif name == "lseek":
            file.position = returned
        elif name in ("write", "writev", "pwrite64", "pwritev"):
            place = int(arguments.rpartition(",")[2]) if name.startswith("p") else file.position
            if not name.startswith("p"):
                file.position += returned
            if path:
                data = b"".join(map(decoded, TEXT.findall(arguments)))[:returned]
                yield Operation("write", path, size=-1 if file.appends else place, data=data)
        elif name == "ftruncate" and path:
            yield Operation("resize", path, size=int(arguments.rpartition(",")[2]))
        elif name in ("fsync", "fdatasync") and path:
            yield Operation("sync", path)
        elif name == "syncfs":
            yield Operation("sync_all")
        elif name in UNSEEN or ("PROT_WRITE" in arguments and "MAP_SHARED" in arguments):
            for _, printed, _ in DESCRIPTOR.findall(arguments):
                if self.inside(printed):
                    raise NotImplementedError(f"{name} {path}: strace does not see its data")

    def moved(self, name: str, old: str | None, new: str | None) -> Iterator[Operation]:
        if (old is None) != (new is None):
            raise NotImplementedError(f"{name} {old} → {new}: into the recorded folder, or out of it")
        if old and new:
            yield Operation(name[:6] if name.startswith("rename") else "link", old, new)

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
                base = decoded(match[2]).decode()
            else:
                path = os.path.normpath(os.path.join(base, decoded(match[4]).decode()))
                paths.append(self.inside_text(path))
        return paths

    def inside(self, printed: str | None) -> str | None:
        """Return a path relative to the recorded folder; ``None`` if it is outside."""
        return None if printed is None else self.inside_text(decoded(printed).decode(errors="replace"))

    def inside_text(self, path: str) -> str | None:
        if path == self.folder:
            return "."
        return path.removeprefix(f"{self.folder}/") if path.startswith(f"{self.folder}/") else None


def decoded(printed: str) -> bytes:
    return bytes.fromhex(printed.replace("\\x", ""))
