"""Read an index: the embeddings that ``d2v embed`` writes, with their ids and the model that made them.

Shapes: N rows of the index, P channels.
"""

import json
from inspect import signature
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from d2v_composer.config.reference import ModelReference
from d2v_composer.embedding.embed_source import INDEX_KEY, IndexRecord, about_file, ids_file
from d2v_composer.sources import listed
from d2v_composer.system.errors import reading
from d2v_composer.system.fetch import exists, fetch

FLOATS = tuple(map(np.dtype, ("float16", "float32", "float64")))  # of an index


class VectorIndex(NamedTuple):
    """An index: embeddings, their ids, and the model that made them."""

    ids: NDArray[np.str_]
    """Id of each row, (N,)."""
    rows: NDArray
    """Embeddings, (N, P), float16, float32 or float64."""
    made_by: IndexRecord | None
    """Model and samples of the index; ``None`` if the index does not state them."""


def read_index(path: str) -> VectorIndex:
    """Read what ``d2v embed`` writes: NAME.npy with NAME.ids.npy, or NAME.parquet with the columns id and embedding."""
    with reading(path):
        if path.endswith(".npy"):
            rows, stored = np.load(fetch(path), mmap_mode="r"), None
            with reading(names := ids_file(path)):
                ids = np.load(fetch(names)).astype(str)
                if ids.shape != (len(rows),):
                    raise ValueError(f"expected one id for each of the {len(rows)} rows, got ids of shape {ids.shape}")
            if exists(about := about_file(path)):
                stored = fetch(about).read_bytes()
        elif not path.endswith(".parquet"):
            raise ValueError("expected a file named NAME.npy or NAME.parquet")
        else:
            from pyarrow.parquet import read_table  # an extra

            table, about = read_table(fetch(path), columns=["id", "embedding"]).combine_chunks(), path
            stored = (table.schema.metadata or {}).get(INDEX_KEY)
            ids, column = np.array(table["id"].to_pylist(), str), table["embedding"].combine_chunks()
            widths = set(column.value_lengths().to_pylist())
            if len(widths) > 1:
                raise ValueError("its embeddings differ in width")
            rows = column.flatten().to_numpy(zero_copy_only=False).reshape(len(ids), *widths)
        if not rows.size:
            raise ValueError("it is empty")
        if rows.ndim != 2 or rows.dtype not in FLOATS:
            kinds = f"{listed(map(str, FLOATS))} in this machine's byte order"
            raise ValueError(f"expected an array (N, D) of {kinds}, got {rows.dtype} {rows.shape}")
        for first in range(0, len(rows), 1 << 14):
            largest = np.abs(rows[first : first + (1 << 14)]).max(axis=1).astype(np.float64)
            # In float32, the length of other rows would be infinite, or so short that it is not normalized.
            if not (is_usable := (largest == 0) | ((largest > 1e-9) & (largest < 1e15))).all():
                number = first + int(is_usable.argmin())
                raise ValueError(
                    f"the row with id {str(ids[number])!r}: expected only zeros, or finite numbers whose "
                    "largest magnitude is from 1e-9 to 1e15"
                )
    with reading(about):
        # Not validate_json, because the name of the folder of samples may be no UTF-8.
        made_by = None if stored is None else TypeAdapter(IndexRecord).validate_python(json.loads(stored))
        if made_by is not None:
            signature(ModelReference).bind(**made_by["reference"])  # the names alone, for the same reason
    return VectorIndex(ids, rows, made_by)
