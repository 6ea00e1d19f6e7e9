"""List the samples of WebDataset tars."""

import json
import re
import tarfile
from array import array
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO, cast

import numpy as np

from d2v_composer.models.provenance import Json
from d2v_composer.sources import CHOOSE, path_of
from d2v_composer.sources.listing import FileSnapshot
from d2v_composer.sources.source import Columns, Int64Array, PackedStrings, SampleListing, fingerprints_of
from d2v_composer.system.errors import InputError

# A member: key and suffixes.
MEMBER = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
# After the last member come two blocks of zeros, and more that fill a record, of 1 MiB at most.
LEAST_ZEROS, MOST_ZEROS = 1 << 10, 1 << 20


def list_samples(snapshot: FileSnapshot, file: BinaryIO, columns: Columns) -> SampleListing:
    """List the samples of a tar, with their labels if ``columns.labels`` is set, otherwise with their paths."""
    name, modality = snapshot.name, columns.modality
    left_out, keys, offsets, sizes = Counter[str](), list[str](), array("q"), array("q")
    labels, paths = list[Json](), list[str]()
    labeled, _, key_of_label = (columns.labels or "").partition(":")
    for key, members in read_tar(file):
        if key is None:
            left_out.update(kind for kind, *_ in members)
            continue
        fields = {suffix: place for suffix, *place in members}
        suited = [suffix for suffix in fields if f".{suffix}".lower().endswith(modality.suffixes)]
        images = [suffix for suffix in suited if suffix == (columns.samples or suffix)]
        left_out.update(f".{suffix}" for suffix, *_ in members if suffix not in (*images, labeled))
        if not images:
            left_out[f"keys without {modality.unit}"] += 1
            continue
        if len(images) > 1:
            raise InputError(f"{name}/{key} has several {modality.unit}: {' and '.join(images)}; {CHOOSE}")
        if len(fields) < len(members):
            raise InputError(f"{name}: key {key} has two members of the same name")
        if labeled:
            if labeled not in fields:
                raise InputError(f"{name}/{key} has no label .{labeled}; its suffixes: {', '.join(fields)}")
            label = read_bytes(file, *fields[labeled]).decode().strip()
            label = json.loads(label).get(key_of_label) if key_of_label else label
            labels.append(int(label) if re.fullmatch(r"-?\d+", str(label)) else label)
        keys.append(key)
        paths.append(f"{key}.{images[0]}")
        offsets.append(fields[images[0]][0])
        sizes.append(fields[images[0]][1])
    if twice := next((key for key, count in Counter(keys).items() if count > 1), None):
        raise InputError(f"{name}: two samples have the key {twice}, and other samples lie between them")
    ids = PackedStrings(f"{snapshot.file.path}/{key}" for key in keys)
    fingerprints = fingerprints_of(len(keys), snapshot.file, columns.samples)
    load = partial(_load, snapshot, np.array(offsets), np.array(sizes))
    return SampleListing(
        ids, np.array(sizes), fingerprints, load, labels if labeled else PackedStrings(paths), left_out=left_out
    )


def read_tar(file: BinaryIO) -> Iterator[tuple[str | None, list[tuple[str, int, int]]]]:
    """Yield the samples of a tar: adjacent members whose paths are equal up to the first dot of the file's name.

    Yields:
        The key, and the suffix, offset and size in bytes of each member. Members that belong to no sample have the key
        ``None`` and, in place of the suffix, a description.

    Raises:
        ValueError: The tar is damaged, cut, or joined to another file, or has a sparse member.
        tarfile.TarError: The tar is damaged.
    """
    key, members = None, list[tuple[str, int, int]]()
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            cast("Any", tar).members.clear()  # tarfile would keep every member in memory
            if member.issparse():
                raise ValueError(f"its member {member.name} is sparse; pack the files without tar's option -S")
            if member.isdir():
                continue
            path = path_of(member.name)
            name = MEMBER.fullmatch(path) if member.isreg() else None
            if members and (name and name[1]) != key:
                yield key, members
                members = []
            key = name and name[1]
            unnamed = "members without a key" if member.isreg() else "links and devices"
            kind = name[2] if name else unnamed if path else "hidden"
            members.append((kind, member.offset_data, member.size))
        # tarfile takes a damaged header for the end, and misses a cut between two members.
        rest = read_bytes(file, tar.offset, MOST_ZEROS + 1)
    if rest.strip(b"\0") or not LEAST_ZEROS <= len(rest) <= MOST_ZEROS:
        raise ValueError(
            f"expected a member, or only the end mark, from byte {tar.offset} on: the tar is damaged, cut or joined to "
            "another"
        )
    if members:
        yield key, members


def read_bytes(file: BinaryIO, offset: int, size: int) -> bytes:
    """Return at most ``size`` bytes of a file, from ``offset`` on."""
    file.seek(offset)
    return file.read(size)


def _load(snapshot: FileSnapshot, offsets: Int64Array, sizes: Int64Array, number: int) -> bytes:
    return snapshot.read(lambda file: read_bytes(file, offsets[number], sizes[number]))
