"""Embeddings and ids in a file: in parts while they come to be, then as .npy or Parquet, all or nothing.

Shapes: N images, D channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray
from typing_extensions import override

from d2v_composer.system.atomic_files import check_out_file, partial_file
from d2v_composer.system.errors import InputError

__all__ = ["EmbeddingFile", "NpyFile", "ParquetFile", "Part", "open_out", "read_skipped", "write_part"]


class Part(NamedTuple):
    """The embeddings of some neighbouring images of a collection."""

    ids: NDArray
    """(N,) unicode or int64."""
    embeddings: NDArray
    """(N, D)."""
    skipped: list[str]
    """Why other images, between these, could not be read."""


def write_part(path: Path, part: Part) -> None:
    """Write a file that exists only once it is whole."""
    with partial_file(path) as partial_path, partial_path.open("wb") as file:
        np.savez(file, ids=part.ids, embeddings=part.embeddings, skipped=np.array(part.skipped, dtype=np.str_))


def read_skipped(path: Path) -> list[str]:
    """What a part's file says of unreadable images; its embeddings are not read."""
    return _read(path, "skipped").tolist()


def _read(path: Path, name: str) -> NDArray:
    with np.load(path) as stored:
        return stored[name]


class EmbeddingFile(ABC):
    """A file of embeddings that is not there yet.

    Args:
        out: Its path.

    Raises:
        InputError: It is there already, or cannot be.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.refuse_existing()
        check_out_file(out)

    @property
    def folder(self) -> Path:
        """Where its parts are until all are there."""
        return self.out.with_name(f".{self.out.name}.partial")

    def refuse_existing(self) -> None:
        """Make sure that nothing is overwritten.

        Raises:
            InputError: The file is there.
        """
        if self.out.exists():
            left = f"; {self.folder} is left of an interrupted run, and can go" if self.folder.exists() else ""
            raise InputError(f"{self.out}: is there already: remove it, or choose another OUT{left}")

    @abstractmethod
    def assemble(self, parts: Sequence[Path], dtype: str) -> None:
        """Make the file of its parts, one after the other in memory; it is there only once it is whole.

        Args:
            parts: The files of at least one embedding, in their order.
            dtype: Of the embeddings.
        """


class NpyFile(EmbeddingFile):
    """(N, D) in NAME.npy, and the ids, (N,), in NAME.ids.npy, which is there first."""

    @property
    def ids(self) -> Path:
        return self.out.with_name(f"{self.out.stem}.ids.npy")

    @override
    def refuse_existing(self) -> None:
        super().refuse_existing()
        # With parts beside it, it is ours: a run was interrupted between the two files.
        if self.ids.exists() and not self.folder.exists():
            raise InputError(f"{self.ids}: is there already: remove it, or choose another OUT")

    @override
    def assemble(self, parts: Sequence[Path], dtype: str) -> None:
        ids, embeddings = self.folder / "ids.npy", self.folder / "embeddings.npy"
        # Unicode arrays are as wide as their longest string.
        shapes = [(stored.dtype, len(stored)) for stored in (_read(part, "ids") for part in parts)]
        id_dtype, num_images = np.result_type(*(each for each, _ in shapes)), sum(count for _, count in shapes)
        with partial_file(ids) as partial_path, partial_path.open("wb") as file:
            _write_npy(file, (num_images,), id_dtype, (_read(part, "ids") for part in parts))
        channels = _read(parts[0], "embeddings").shape[1]
        with partial_file(embeddings) as partial_path, partial_path.open("wb") as file:
            _write_npy(file, (num_images, channels), dtype, (_read(part, "embeddings") for part in parts))
        ids.replace(self.ids)
        embeddings.replace(self.out)


def _write_npy(file: BinaryIO, shape: tuple[int, ...], dtype: DTypeLike, arrays: Iterable[NDArray]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for array in arrays:
        file.write(array.astype(dtype, copy=False).tobytes())


class ParquetFile(EmbeddingFile):
    """The columns ``id`` and ``embedding``, a list of D numbers; a row group for each part."""

    def __init__(self, out: Path) -> None:
        if find_spec("pyarrow") is None:
            raise InputError(f"{out}: .parquet needs pyarrow: pip install -e '.[parquet]'")
        super().__init__(out)

    @override
    def assemble(self, parts: Sequence[Path], dtype: str) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        channels = _read(parts[0], "embeddings").shape[1]
        number = pa.float16() if dtype == "float16" else pa.float32()
        id_type = pa.int64() if _read(parts[0], "ids").dtype.kind == "i" else pa.string()
        schema = pa.schema([("id", id_type), ("embedding", pa.list_(number, channels))])
        partial = self.folder / "embeddings.parquet"
        with (
            partial_file(partial) as partial_path,
            partial_path.open("wb") as file,
            # Hardly a number occurs twice: a dictionary of them would only take time.
            parquet.ParquetWriter(file, schema, use_dictionary=False) as writer,
        ):
            for part in _with_images(parts):
                numbers = pa.array(_read(part, "embeddings").reshape(-1), number)
                columns = [pa.array(_read(part, "ids"), id_type), pa.FixedSizeListArray.from_arrays(numbers, channels)]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))
        partial.replace(self.out)


def _with_images(parts: Iterable[Path]) -> Iterator[Path]:
    return (part for part in parts if len(_read(part, "ids")))


def open_out(out: Path) -> EmbeddingFile:
    """The file to be written, by its ending.

    Raises:
        InputError: It ends otherwise than .npy or .parquet, is there already, or cannot be.
    """
    if out.suffix == ".npy":
        return NpyFile(out)
    if out.suffix == ".parquet":
        return ParquetFile(out)
    raise InputError(f"{out}: must end in .npy or .parquet")
