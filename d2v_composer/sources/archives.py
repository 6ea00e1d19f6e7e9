"""List and read the samples of an archive."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np

from d2v_composer.data.modality import MAX_BYTES
from d2v_composer.sources import path_of
from d2v_composer.sources.listing import FileSnapshot
from d2v_composer.sources.source import Columns, Int64Array, PackedStrings, SampleListing, fingerprints_of
from d2v_composer.system.errors import InputError, UnreadableSampleError


class Member(NamedTuple):
    """A file or folder in an archive."""

    name: str
    """The name as stored in the archive."""
    path: str
    """The name with slashes as separators; the path of a folder ends with a slash."""
    size: int
    """Size of the uncompressed content, in bytes."""
    place: tuple[int, ...]
    """Whole numbers from which a :data:`Read` function finds the content; their count is the same for all members."""
    fault: str = ""
    """Why the member cannot be read, as the end of the message 'PATH is …'; '' if the member can be read."""


Read = Callable[[BinaryIO, str, int, tuple[int, ...]], bytes]
"""A function that returns a member's content, given the open archive and the member's name, size and place."""


def list_archive(snapshot: FileSnapshot, columns: Columns, members: Iterable[Member], read: Read) -> SampleListing:
    """List the samples of an archive; the ``labels`` of the listing are the samples' paths in the archive."""
    left_out, names, paths, places = Counter[str](), list[str](), list[str](), array("q")
    for member in members:
        path, suffix = path_of(member.path), PurePosixPath(member.path).suffix.lower()
        if member.path.endswith("/"):
            continue
        if not path:
            left_out["hidden"] += 1
        elif suffix not in columns.modality.suffixes:
            left_out[suffix or "without suffix"] += 1
        elif member.fault:
            raise InputError(f"{snapshot.name}: {path} is {member.fault}")
        else:
            names.append(member.name)
            paths.append(path)
            places.extend((member.size, *member.place))
    if twice := next((path for path, count in Counter(paths).items() if count > 1), None):
        raise InputError(f"{snapshot.name} has two members named {twice}")
    ids = PackedStrings(f"{snapshot.file.path}/{name}" for name in names)
    table = np.array(places, np.int64).reshape(len(names), -1 if names else 1)
    fingerprints = fingerprints_of(len(ids), snapshot.file)
    return SampleListing(
        ids, table[:, 0], fingerprints, partial(_load, snapshot, ids, table, read), paths, left_out=left_out
    )


def _load(snapshot: FileSnapshot, ids: PackedStrings, table: Int64Array, read: Read, number: int) -> bytes:
    path = ids[number].removeprefix(snapshot.file.path)
    size, *place = table[number].tolist()
    if size > MAX_BYTES:
        raise UnreadableSampleError(f"{snapshot.name}{path} has {size:,} bytes; the limit is {MAX_BYTES:,}")
    return snapshot.read(lambda file: read(file, path[1:], size, tuple(place)), path)
