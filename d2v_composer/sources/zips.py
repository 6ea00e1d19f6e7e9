"""List the samples of zips."""

import struct
from array import array
from collections import Counter
from functools import partial
from pathlib import PurePosixPath
from typing import BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipExtFile, ZipFile, ZipInfo

import numpy as np

from d2v_composer.data.modality import MAX_BYTES
from d2v_composer.sources import path_of
from d2v_composer.sources.listing import Pinned
from d2v_composer.sources.source import Columns, Int64Array, Listed, Names, marks_of
from d2v_composer.system.errors import InputError, UnreadableSampleError


def list_samples(pinned: Pinned, file: BinaryIO, columns: Columns) -> Listed:
    """List the samples of a zip, with their paths in the zip, which tell split and class.

    Raises:
        InputError: A sample is encrypted, compressed by a method other than deflate, or there twice.
        ValueError, zipfile.BadZipFile: The zip is damaged, or joined to another.
    """
    left_out, names, paths, places = Counter[str](), list[str](), list[str](), array("q")
    with ZipFile(file) as archive:
        members = archive.infolist()
    if members and (before := min(member.header_offset for member in members)):
        raise ValueError(f"{before} bytes precede its first member: it is damaged, or joined to another")
    for member in members:
        name = member.filename.replace("\\", "/")  # old PowerShells write backslashes
        if name.endswith("/"):  # a folder
            continue
        path, suffix = path_of(name), PurePosixPath(name).suffix.lower()
        if not path:
            left_out["hidden"] += 1
        elif suffix not in columns.modality.suffixes:
            left_out[suffix or "without suffix"] += 1
        elif member.flag_bits & 1 or member.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
            raise InputError(f"{pinned.name}: {path} is encrypted, or compressed by a method other than deflate")
        else:
            names.append(member.filename)
            paths.append(path)
            places.extend(
                (member.header_offset, member.compress_type, member.compress_size, member.file_size, member.CRC)
            )
    if twice := next((path for path, count in Counter(paths).items() if count > 1), None):
        raise InputError(f"{pinned.name} has two members named {twice}")
    ids, table = Names(f"{pinned.file.path}/{name}" for name in names), np.array(places, np.int64).reshape(-1, 5)
    marks = marks_of(len(ids), pinned.file)
    return Listed(ids, table[:, 3], marks, partial(_load, pinned, ids, table), paths, left_out=left_out)


def _load(pinned: Pinned, ids: Names, table: Int64Array, number: int) -> bytes:
    """Read a member at its known place in the file; a ZipFile would first read the names of all members."""
    path = ids[number].removeprefix(pinned.file.path)
    member = ZipInfo(path[1:])
    offset, *sizes = table[number].tolist()
    member.compress_type, member.compress_size, member.file_size, member.CRC = sizes
    if member.file_size > MAX_BYTES:
        raise UnreadableSampleError(f"{pinned.name}{path} has {member.file_size:,} bytes, more than {MAX_BYTES:,}")

    def read(file: BinaryIO) -> bytes:
        file.seek(offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
        return ZipExtFile(file, "r", member).read()

    return pinned.read(read, path)
