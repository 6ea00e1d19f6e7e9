"""Write local files so that a reader, or a restart after a kill, finds the complete file or the one before it."""

import glob
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from d2v_composer.system.addresses import Address
from d2v_composer.system.errors import InputError

__all__ = [
    "check_out_file",
    "existing_folder",
    "find_partials",
    "find_unwritable",
    "out_file",
    "partial_file",
    "write_atomically",
]

# NAME.PROCESS-NUMBER.partial; downloaders append suffixes of their own. It ends like no file that we look for.
PARTIAL = re.compile(r"\.\d+-\d+\.partial(\.tmp|\.\w{8})?$")


def existing_folder(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(each for each in (folder, *folder.absolute().parents) if each.is_dir())


def check_out_file(path: Path, *, overwrite: bool = True) -> None:
    """Check, before the work begins, that a file can be written; its folder may not exist yet.

    Args:
        path: The file.
        overwrite: Accept one that exists.

    Raises:
        InputError: The path is a folder or an object store's address, its folder is not writable, or it exists.
    """
    if _is_address(path):
        raise InputError(f"{path}: must be a local file, not in an object store")
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file to write")
    if not overwrite and os.path.lexists(path):
        raise InputError(f"{path}: exists already: choose another file, or append --overwrite")
    if path.is_file() and not os.access(path, os.W_OK):
        raise InputError(f"{path}: cannot be written: it is read-only")
    if (fault := find_unwritable(path.parent)) is not None:
        raise InputError(f"{path}: {fault}")


def find_unwritable(folder: Path) -> str | None:
    """Return why files cannot be written into a folder, which may not exist yet; ``None`` if they can."""
    absolute = folder.absolute()
    existing = next(each for each in (absolute, *absolute.parents) if os.path.lexists(each))
    if not os.path.isdir(existing):
        return f"cannot be written: {existing} is not a folder"
    try:  # permissions do not tell of a read-only file system, nor what root may not do
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        return f"cannot be written: {existing} is not writable ({error.strerror})"
    return None


def _is_address(path: Path) -> bool:
    try:
        return Address.parse(str(path).replace(":/", "://", 1)).is_remote  # Path has dropped one of the slashes
    except ValueError:  # an address with a mistake in it
        return True


@contextmanager
def partial_file(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write or download to, and rename it to ``path`` when the block ends.

    Check the content at the end of the block: after an error the temporary file is removed, and ``path`` is as before.
    Several processes and nodes may write the same path at once; the last one wins.

    Args:
        path: The final path. Missing folders are made.
        sync: Flush the file to the disk before the rename, so that it survives a power failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.randbits(32)}.partial")
    try:
        yield partial
        if sync:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error matters more
            for left in path.parent.glob(f"{glob.escape(partial.name)}*"):  # downloaders write next to it
                left.unlink()
        raise


@contextmanager
def out_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a command's result, see :func:`partial_file`; give it a new file's usual permissions.

    Raises:
        InputError: The disk is full or fails, or a permission is missing.
    """
    try:
        with partial_file(path) as partial:
            partial.touch()
            mode = stat.S_IMODE(partial.stat().st_mode)
            yield partial
            if stat.S_IMODE(partial.stat().st_mode) != mode:  # safetensors lets only the owner read its files
                partial.chmod(mode)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from error


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write a complete file, or leave ``path`` as it was."""
    with partial_file(path) as partial:
        partial.write_bytes(contents.encode() if isinstance(contents, str) else contents)


def find_partials(paths: Collection[Path]) -> Iterator[Path]:
    """Yield the temporary files that killed processes left next to these paths, and no other files."""
    for folder in {path.parent for path in paths}:
        for partial in folder.glob("*.partial*"):
            name = PARTIAL.sub("", partial.name)
            is_ours = name != partial.name and folder / name in paths
            if is_ours and partial.is_file() and not partial.is_symlink():
                yield partial
