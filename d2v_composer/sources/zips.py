"""List the samples of zips."""

import struct
from typing import BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipExtFile, ZipFile, ZipInfo

from d2v_composer.sources.archives import Member, list_archive
from d2v_composer.sources.listing import FileSnapshot
from d2v_composer.sources.source import Columns, SampleListing


def list_samples(snapshot: FileSnapshot, file: BinaryIO, columns: Columns) -> SampleListing:
    """List the samples of a zip; see :func:`list_archive`."""
    with ZipFile(file) as archive:
        members = archive.infolist()
    if members and (before := min(member.header_offset for member in members)):
        raise ValueError(f"{before} bytes precede its first member: the zip is damaged, or joined to another file")
    return list_archive(snapshot, columns, map(_describe, members), _read)


def _describe(member: ZipInfo) -> Member:
    other = "" if member.compress_type in (ZIP_STORED, ZIP_DEFLATED) else "compressed by a method other than deflate"
    return Member(
        member.filename,
        member.filename.replace("\\", "/"),  # old PowerShells write backslashes
        member.file_size,
        (member.header_offset, member.compress_type, member.compress_size, member.CRC),
        "encrypted" if member.flag_bits & 1 else other,
    )


def _read(file: BinaryIO, name: str, size: int, place: tuple[int, ...]) -> bytes:
    member = ZipInfo(name)
    offset, member.compress_type, member.compress_size, member.CRC = place
    member.file_size = size
    file.seek(offset + 26)
    file.seek(sum(struct.unpack("<HH", file.read(4))), 1)
    return ZipExtFile(file, "r", member).read()
