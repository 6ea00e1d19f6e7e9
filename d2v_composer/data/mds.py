"""Read samples from MDS shards, MosaicML Streaming's format, as Streaming 0.13.0 writes them.

A shard is the number of its samples N, the N + 1 offsets of the samples in the file, a description, and the samples. A
sample is the sizes of those columns that have no fixed size, then the columns. All these numbers are uint32.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from PIL import Image
from typing_extensions import Self


def _read_pil(data: bytes) -> Image.Image:
    width, height, mode_size = np.frombuffer(data[:12], np.uint32).tolist()
    if width * height > 8 * len(data):  # Pillow allocates them first; mode 1 has 8 pixels in a byte
        raise ValueError(f"it has {len(data)} bytes for {width} x {height} pixels")
    return Image.frombytes(data[12 : 12 + mode_size].decode(), (width, height), data[12 + mode_size :])


def _number(dtype: str) -> Callable[[bytes], int | float]:
    return lambda data: np.frombuffer(data, dtype)[0].item()


# Encodings of a column of images: files, which we decode only with decoders that we allow, and raw pixels.
IMAGES: dict[str, Callable[[bytes], Any]] = {"bytes": bytes, "jpeg": bytes, "png": bytes, "pil": _read_pil}
NUMBERS = [*(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32", "float64"]
ENCODINGS = {
    **IMAGES,
    **{dtype: _number(dtype) for dtype in NUMBERS},
    "int": _number("int64"),
    "str": bytes.decode,
    "str_int": int,
}


class ShardFile(NamedTuple):
    """Index entry for a file."""

    basename: str
    bytes: int
    hashes: Mapping[str, str]
    """Algorithm in hashlib or xxhash → hash of the content; may be empty."""

    def find_fault(self, path: Path) -> str | None:
        """Return an error message if a file differs from its entry, or ``None``."""
        if (size := path.stat().st_size) != self.bytes:
            return f"{path}: has {size} bytes, but the index says {self.bytes}"
        # Of several hashes, those of xxhash take the least time.
        for algorithm in sorted(self.hashes, key=lambda name: not name.startswith("xxh"))[:1]:
            content = path.read_bytes()
            ours = algorithm in xxhash.algorithms_available
            digest = getattr(xxhash, algorithm)(content) if ours else hashlib.new(algorithm, content)
            if digest.hexdigest() != self.hashes[algorithm]:
                return f"{path}: its content has changed ({algorithm})"
        return None


class Shard(NamedTuple):
    """Index entry for a shard."""

    samples: int
    raw: ShardFile
    zipped: ShardFile | None
    compression: str | None
    columns: list[tuple[str, int | None, Callable[[bytes], Any] | None]]
    """Name, bytes (``None``: they vary) and decoder (``None``: not read) of each column."""

    @classmethod
    def parse(cls, entry: Mapping[str, Any], wanted: Collection[str]) -> Self:
        """Parse an index entry, to read only the wanted columns.

        Raises:
            LookupError, TypeError, ValueError: It is corrupt, or of another format, whose keys are others.
        """
        raw, zipped = (entry[kind] and ShardFile(**entry[kind]) for kind in ("raw_data", "zip_data"))
        found = zip(entry["column_names"], entry["column_sizes"], entry["column_encodings"], strict=True)
        columns = [(name, size, ENCODINGS[encoding] if name in wanted else None) for name, size, encoding in found]
        return cls(entry["samples"], raw, zipped, entry["compression"], columns)

    def read(self, path: Path, number: int) -> dict[str, Any]:
        """Read the wanted columns of a sample from the shard's raw file.

        Raises:
            OSError: The file cannot be read.
            ArithmeticError, LookupError, TypeError, ValueError: It is corrupt.
        """
        with path.open("rb", buffering=0) as file:
            file.seek(4 * (1 + number))
            begin, end = np.frombuffer(file.read(8), np.uint32).tolist()
            if not begin < end <= self.raw.bytes:
                raise ValueError(f"its offsets are {begin} and {end}")
            file.seek(begin)
            data = file.read(end - begin)
        num_varying = sum(size is None for _, size, _ in self.columns)
        varying = iter(np.frombuffer(data, np.uint32, num_varying).tolist())
        sample, at = {}, 4 * num_varying
        for name, fixed, decode in self.columns:
            size = next(varying) if fixed is None else fixed
            if decode is not None:
                sample[name] = decode(data[at : at + size])
            at += size
        if at != len(data):  # a slice beyond the end is short, in silence
            raise ValueError(f"its columns have {at} bytes, but the sample has {len(data)}")
        return sample
