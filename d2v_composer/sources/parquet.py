"""List the samples of Parquet files."""

import json
import os
import re
from bisect import bisect_right
from functools import lru_cache, partial
from threading import Lock
from typing import Any, BinaryIO

import numpy as np

from d2v_composer.sources import CHOOSE, CHOOSE_LABELS
from d2v_composer.sources.listing import FileSnapshot
from d2v_composer.sources.source import (
    Columns,
    PackedStrings,
    SampleListing,
    fingerprint_of,
    fingerprints_of,
    hash_of,
    load_listed,
)
from d2v_composer.system.errors import InputError, UnreadableSampleError
from d2v_composer.system.fetch import File, is_remote

# Types of columns that can hold samples: bytes, or the hub's struct of bytes and path; or paths.
BYTES, PATH = r"(?:large_)?binary|struct<([^<>]*, )?bytes: (?:large_)?binary\b.*>", "(?:large_)?string"

_one_reader = Lock()  # one thread at a time decodes a row group


def list_samples(snapshot: FileSnapshot, file: BinaryIO, columns: Columns) -> SampleListing:
    """List the rows of a Parquet file as samples."""
    import pyarrow.parquet

    name, folder, column, label = snapshot.name, snapshot.path.parent, columns.samples, columns.labels
    with pyarrow.parquet.ParquetFile(file) as opened:
        schema, metadata = opened.schema_arrow, opened.metadata
        types = {field.name: str(field.type) for field in schema}
        of_bytes, of_paths = ([key for key in types if re.fullmatch(kind, types[key])] for kind in (BYTES, PATH))
        fits = of_bytes or of_paths
        chosen = [key for key in of_bytes + of_paths if key == column] if column else fits
        if len(chosen) != 1:
            kind = f"has the type {types[column]}" if column in types else "is missing"
            problem = f"{column!r} {kind}" if column else f"{len(fits) or 'no'} columns fit"
            raise InputError(
                f"{name}: expected one column of {columns.modality.unit}, as bytes or paths; {problem}; "
                f"columns: {', '.join(types if column else fits or types)}{f'; {CHOOSE}' if fits else ''}"
            )
        if label not in (None, *types):
            raise InputError(f"{name}: no label column {label!r}; columns: {', '.join(types)}; {CHOOSE_LABELS}")
        labels = opened.read([label])[0].to_pylist() if label else []
        hub = json.loads((schema.metadata or {}).get(b"huggingface", "{}")).get("info", {}).get("features", {})
        class_names = hub.get(label, {}).get("names", ())
        ids = PackedStrings(f"{snapshot.file.path}#{row}" for row in range(metadata.num_rows))
        fingerprints = fingerprints_of(len(ids), snapshot.file, column)
        if chosen[0] in of_bytes:
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            rows = [group.num_rows for group in groups]
            means = [group.total_byte_size // max(group.num_rows, 1) for group in groups]
            load = partial(_load_row, snapshot, chosen[0], np.cumsum([0, *rows]).tolist())
            return SampleListing(
                ids, np.repeat(np.array(means, np.int64), rows), fingerprints, load, labels, class_names
            )
        if is_remote(name):
            raise InputError(
                f"{name}: column {chosen[0]!r} holds paths, which are allowed only in a local Parquet file"
            )
        paths = PackedStrings(path or "" for path in opened.read(chosen)[0].to_pylist())
    files = [File.of(path, folder / path) if os.path.isfile(folder / path) else None for path in paths]
    hashes = np.array([*map(fingerprint_of, files)], np.int64)
    sizes = np.array([item.size if item else 0 for item in files])
    content = hash_of([file and file[:3] for file in files])
    return SampleListing(
        ids,
        sizes,
        fingerprints + hashes,
        partial(load_listed, folder, paths, hashes),
        labels,
        class_names,
        content=content,
    )


def _load_row(snapshot: FileSnapshot, column: str, starts: list[int], row: int) -> bytes:
    group = bisect_right(starts, row) - 1
    with _one_reader:
        rows = _row_group(snapshot, column, group)
    value = rows[row - starts[group]].as_py()
    value = value["bytes"] if isinstance(value, dict) else value
    if value is None:
        raise UnreadableSampleError(f"{snapshot.name}#{row} is null")
    return value


@lru_cache(maxsize=1)
def _row_group(snapshot: FileSnapshot, column: str, group: int) -> Any:
    import pyarrow.parquet

    def read(file: BinaryIO) -> Any:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as opened:
            return opened.read_row_group(group, [column], use_threads=False)[0]

    return snapshot.read(read, f", row group {group}")
