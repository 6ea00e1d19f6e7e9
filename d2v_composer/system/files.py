"""Check, read, lock and atomically write local files, and check the free space of a disk."""

import errno
import hashlib
import json
import logging
import multiprocessing.util
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from d2v_composer.system.errors import InputError, reading, writing
from d2v_composer.system.processes import num_nodes

# Partial files are named NAME.PROCESS-NUMBER.partial, which is no suffix of samples; downloaders append their own.
PARTIAL = re.compile(r"\.\d+-\d+\.partial(\.tmp|\.\w{8})?$")
# Errors of file systems without locks, such as Lustre without its option for them.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
# multiprocessing appends 33 characters for a socket, whose path has at most 107.
LONGEST_SOCKET_FOLDER = 70

KindT = TypeVar("KindT")

log = logging.getLogger(__name__)

_free: set[Path] = set()
"""Paths where :func:`check_out_file`, without ``overwrite``, found no file; :func:`move` replaces no file there."""


def check_out_file(path: Path, *, overwrite: bool = True) -> None:
    """Check that a file can be written; its folder need not exist.

    Without ``overwrite``, :func:`move` also refuses to replace a file that was created after this check.
    """
    if re.match(r"\w\w+:/", path.as_posix()):  # not C:/
        raise InputError(f"{path}: expected the path of a local file, not an address")
    if path.is_dir():
        raise InputError(f"{path} is a folder; expected a file to write")
    _free.discard(path)
    if not overwrite:
        _check_free(path)
        _free.add(path)
    folder = path.parent.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    try:  # permissions do not show a read-only file system, nor what root may not do
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {existing}: {error.strerror}") from error


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        raise InputError(f"{path} already exists; choose another file, or append --overwrite")


def flush(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    is_folder = path.is_dir()
    with suppress(OSError) if is_folder else nullcontext():  # Windows opens no folder, and some systems flush none
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows flushes no file open for reading
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def move(partial: Path, path: Path) -> None:
    """Rename a complete file to its final path, replacing an existing file; the new file survives a loss of power."""
    flush(partial)  # or the name might reach the disk before the content
    if path in _free:
        _check_free(path)
        _free.remove(path)
    partial.replace(path)
    flush(path.parent)


def check_owned(folder: Path | str, names: Iterable[str], mark: str, key: str) -> None:
    """Check that a folder, local or in a store, holds no foreign files."""
    inside = {name.partition("/")[0] for name in names}
    if inside and mark not in inside:
        raise InputError(f"{key}: {folder} holds foreign files, such as {min(inside)}; choose another folder")


@contextmanager
def partial_file(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield the path of a temporary file to write, which is renamed to ``path`` when the ``with`` block ends.

    After an error, the temporary file is removed, and ``path`` is as before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.randbits(32)}.partial")
    try:
        yield partial
        move(partial, path) if sync else partial.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error matters more
            for left in (file for file in path.parent.iterdir() if file.name.startswith(partial.name)):
                left.unlink()  # downloaders write next to it
        raise


@contextmanager
def out_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path as :func:`partial_file` does; the final file has the permissions of a new file."""
    with writing(path), partial_file(path) as partial:
        partial.touch()
        mode = stat.S_IMODE(partial.stat().st_mode)
        yield partial
        partial.chmod(mode)  # safetensors lets only the owner read its files


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write a complete file, or leave ``path`` as it was."""
    with writing(path), partial_file(path) as partial:
        # A file's name may be no UTF-8.
        partial.write_bytes(contents.encode(errors="backslashreplace") if isinstance(contents, str) else contents)


def find_partials(paths: Collection[Path]) -> Iterator[Path]:
    """Yield the temporary files of :func:`partial_file` for these paths."""
    for folder in {path.parent for path in paths}:
        for partial in folder.glob("*.partial*"):
            name = PARTIAL.sub("", partial.name)
            if name != partial.name and folder / name in paths and partial.is_file():
                yield partial


def acquire(path: Path, wait: float = 0) -> FileLock | None:
    """Lock a file until the lock is released, or this process ends.

    On a file system without locks, a warning is logged, and the lock has no effect.

    Returns:
        The lock; ``None`` if the file is locked elsewhere, even in this process, or if its folder was removed
        meanwhile.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Any thread may release it. A lock that is the file's existence, filelock's fallback, would outlive a killed run.
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(wait)
    except (Timeout, FileNotFoundError):
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks (%s), so two runs may use the same files", path, error.strerror)
    return lock


def missing_parts(path: Path) -> list[Path]:
    """Return which of a path and its parent folders do not exist, from the path upwards."""
    return [part for part in (path, *path.parents) if not part.exists()]


def release(lock: FileLock, made: Sequence[Path]) -> None:
    """Release a lock; first remove what was created for it, unless other files were added there."""
    with suppress(OSError):
        if made and [*made[0].parent.iterdir()] == [made[0]]:
            made[0].unlink()
            for folder in made[1:]:
                folder.rmdir()
    lock.release()


@contextmanager
def sole_user(path: Path, wait: float = 0) -> Iterator[bool]:
    """Hold the lock of :func:`acquire` during the ``with`` block; yield ``False`` if the lock is not available."""
    new_folders, lock = missing_parts(path), acquire(path, wait)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            release(lock, new_folders)


def shorten_socket_paths() -> None:
    """Let multiprocessing create its sockets in /tmp if the path of the temporary folder is too long for a socket."""
    with reading("TMPDIR"):  # a full or read-only disk
        long = tempfile.gettempdir()
    # With a path that is too long, a DataLoader would hang.
    if len(long) > LONGEST_SOCKET_FOLDER and os.name == "posix":
        tempfile.tempdir = "/tmp"
        multiprocessing.util.get_temp_dir()  # made now, used by this process and its children, removed at exit
        tempfile.tempdir = long


def check_room(folder: Path, what: str, total: int, stored: int, advice: str, limit: int | None = None) -> str | None:
    """Return an error message if a disk lacks space for a node's share of what all nodes store; otherwise ``None``."""
    share = total // num_nodes()
    needed = min(share, limit or share) - stored
    present = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if needed <= (free := shutil.disk_usage(present).free):
        return None
    return (
        f"{what} need {needed / 1e6:,.0f} MB more in {folder}, but only {free / 1e6:,.0f} MB is free; "
        f"free disk space, or {advice}"
    )


def read_json(path: Path, kind: type[KindT]) -> KindT:
    """Read a JSON file whose content must be of the type ``kind``, such as ``list[str]`` or a TypedDict."""
    from pydantic import TypeAdapter, ValidationError  # a fifth of a second

    with reading(path):
        try:
            return TypeAdapter(kind).validate_python(json.loads(path.read_bytes()))
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(map(str, fault["loc"])) or "content"
            raise InputError(f"{path} is damaged: {place}: {fault['msg']}") from error


def sha256(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
