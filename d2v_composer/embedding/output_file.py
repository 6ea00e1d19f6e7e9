"""Append embeddings to a file in a folder next to OUT, and move it to OUT when it is complete.

Shapes: N rows, D channels.
"""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from d2v_composer.system.atomic_files import check_out_file, write_atomically
from d2v_composer.system.errors import InputError
from d2v_composer.system.file_locks import sole_user
from d2v_composer.system.packages import install_command
from d2v_composer.system.retry import reason

__all__ = ["EmbeddingFile", "Unreadable"]

LOCK_TIMEOUT = 10  # the workers of a killed run end within a second
ROW_GROUP = 4096  # rows, or ids, that are in memory at a time

Ids = Callable[[NDArray[np.int64]], NDArray]
Unreadable = tuple[int, str]
"""The index of an image, and the reason why it cannot be read."""


class EmbeddingFile:
    """The file OUT: NAME.npy, (N, D), with the ids, (N,), in NAME.ids.npy; or NAME.parquet.

    Parquet has the columns ``id`` and ``embedding``, a list of D numbers. OUT appears when it is complete; NAME.ids.npy
    just before. Until then the rows are in :attr:`folder`, with a record of the progress, from which a killed run
    resumes.

    Args:
        out: The path.
        overwrite: Replace a file that exists, once the new one is complete.

    Raises:
        InputError: The suffix is unknown, the file exists, or it cannot be written.
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        if out.suffix not in (".npy", ".parquet"):
            raise InputError(f"{out}: must end in .npy or .parquet")
        if out.suffix == ".parquet" and find_spec("pyarrow") is None:
            raise InputError(f"{out}: .parquet needs pyarrow: {install_command('parquet', 'pyarrow')}")
        self.out = out
        self.overwrite = overwrite
        self.ids = out.with_name(f"{out.stem}.ids.npy")
        self.folder = out.with_name(f".{out.name}.partial")
        self.num_rows = 0
        self.skipped: list[Unreadable] = []
        self._refuse_existing()

    def _refuse_existing(self) -> None:
        check_out_file(self.out, overwrite=self.overwrite)
        # With our folder next to it, the ids are ours: a run was killed between the two files.
        if self.out.suffix == ".npy" and not self.folder.exists():
            check_out_file(self.ids, overwrite=self.overwrite)

    @property
    def num_images(self) -> int:
        """Images that are done: embedded or skipped."""
        return self.num_rows + len(self.skipped)

    @contextmanager
    def open(self, plan: dict[str, Any], channels: int, dtype: str) -> Iterator[None]:
        """Lock the file while the block lasts, and resume where an interrupted run of the same plan ended.

        Args:
            plan: Everything that the embeddings depend on.
            channels: D.
            dtype: The type of the stored numbers.

        Raises:
            InputError: Another process writes the file, it exists by now, or an interrupted run had another plan.
        """
        self.plan, self.channels, self.dtype = plan, channels, np.dtype(dtype)
        with ExitStack() as stack:
            with self._disk_errors():
                alone = stack.enter_context(sole_user(self.folder / ".lock", LOCK_TIMEOUT))
            if not alone:
                raise InputError(f"{self.out}: another process is writing it")
            self._refuse_existing()  # again: that process may have finished it
            self._resume()
            yield

    def append(self, embeddings: NDArray, skipped: Sequence[Unreadable]) -> None:
        """Add the rows of the next images, (B, D), and record the progress.

        Args:
            embeddings: One row for each readable image.
            skipped: The unreadable images between them.

        Raises:
            InputError: The disk is full or fails.
        """
        with self._disk_errors():
            with _synced(self._rows, "r+b") as file:
                file.seek(self._size(self.num_rows))
                file.write(embeddings.astype(self.dtype, copy=False).tobytes())
            self._record(self.num_rows + len(embeddings), [*self.skipped, *skipped])

    def rewind(self, num_images: int) -> None:
        """Drop what came after the first images, none of which was skipped."""
        with self._disk_errors():
            self._record(num_images, [])

    def finish(self, ids: Ids) -> None:
        """Move the complete file to OUT, replacing an old one, and remove the folder.

        Args:
            ids: Return the ids of images by index.

        Raises:
            InputError: The disk is full or fails.
        """
        readable = np.delete(np.arange(self.num_images), [index for index, _ in self.skipped])
        chunks = [readable[first : first + ROW_GROUP] for first in range(0, self.num_rows, ROW_GROUP)]
        with self._disk_errors():
            if self.out.suffix == ".npy":
                self._write_ids(chunks, ids)
                complete = self._complete_npy()
            else:
                complete = self._write_parquet(chunks, ids)
            complete.replace(self.out)
            shutil.rmtree(self.folder)

    @property
    def _rows(self) -> Path:
        """An .npy file without its header, which is written when the number of rows is known."""
        return self.folder / "embeddings.npy"

    @property
    def _progress(self) -> Path:
        return self.folder / "progress.json"

    def _size(self, num_rows: int) -> int:
        header = len(_npy_header((num_rows, self.channels), self.dtype))
        return header + num_rows * self.channels * self.dtype.itemsize

    def _resume(self) -> None:
        progress: dict[str, Any] = {"plan": self.plan, "rows": 0, "skipped": []}
        if self._progress.is_file():
            progress = json.loads(self._progress.read_bytes())
        num_rows, skipped = progress["rows"], [(index, why) for index, why in progress["skipped"]]
        changed = [key.replace("_", " ") for key, value in self.plan.items() if progress["plan"].get(key) != value]
        if changed and (num_rows or skipped):
            raise InputError(
                f"{self.folder}: an interrupted run had another {', '.join(changed)}: delete that folder, or choose "
                "another OUT"
            )
        with self._disk_errors():
            self._rows.touch()
            if num_rows and self._rows.stat().st_size < self._size(num_rows):  # the rows were deleted
                num_rows, skipped = 0, []
            self._record(num_rows, skipped)

    def _record(self, num_rows: int, skipped: list[Unreadable]) -> None:
        write_atomically(self._progress, json.dumps({"plan": self.plan, "rows": num_rows, "skipped": skipped}))
        self.num_rows, self.skipped = num_rows, skipped

    def _write_ids(self, chunks: list[NDArray[np.int64]], ids: Ids) -> None:
        dtype = np.result_type(*(ids(chunk).dtype for chunk in chunks))  # unicode is as wide as its longest string
        partial = self.folder / "ids.npy"
        with _synced(partial, "wb") as file:
            file.write(_npy_header((self.num_rows,), dtype))
            for chunk in chunks:
                file.write(ids(chunk).astype(dtype, copy=False).tobytes())
        self.out.unlink(missing_ok=True)  # new ids must not lie beside old embeddings
        partial.replace(self.ids)

    def _complete_npy(self) -> Path:
        with _synced(self._rows, "r+b") as file:
            file.write(_npy_header((self.num_rows, self.channels), self.dtype))
            file.truncate(self._size(self.num_rows))
        return self._rows

    def _write_parquet(self, chunks: list[NDArray[np.int64]], ids: Ids) -> Path:
        import pyarrow as pa
        from pyarrow import parquet

        id_type = pa.int64() if ids(chunks[0]).dtype.kind == "i" else pa.string()
        number = pa.float16() if self.dtype == np.float16 else pa.float32()
        schema = pa.schema([("id", id_type), ("embedding", pa.list_(number, self.channels))])
        path, offset = self.folder / "embeddings.parquet", self._size(0)
        with (
            _synced(path, "wb") as file,
            # Hardly a number occurs twice: a dictionary of them would only take time.
            parquet.ParquetWriter(file, schema, use_dictionary=False) as writer,
        ):
            for chunk in chunks:
                numbers = np.fromfile(self._rows, self.dtype, count=len(chunk) * self.channels, offset=offset)
                offset += numbers.nbytes
                embeddings = pa.FixedSizeListArray.from_arrays(pa.array(numbers, number), self.channels)
                writer.write_table(pa.Table.from_arrays([pa.array(ids(chunk), id_type), embeddings], schema=schema))
        return path

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.out}: cannot be written ({reason(error)})") from error


@contextmanager
def _synced(path: Path, mode: str) -> Iterator[IO[bytes]]:
    with open(path, mode) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _npy_header(shape: tuple[int, ...], dtype: DTypeLike) -> bytes:
    """Return the beginning of an .npy file; numpy pads it to the same length for any number of rows."""
    buffer = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(buffer, {"descr": description, "fortran_order": False, "shape": shape})
    return buffer.getvalue()
