"""Read MDS, the format of MosaicML Streaming: an index, and the samples of its shards.

A shard consists of the number of its samples, N; N + 1 offsets in bytes, at which the samples begin and the last sample
ends; a description; and the samples. A sample consists of the sizes in bytes of the columns without a fixed size, and
the values of all columns. Numbers, offsets and sizes are uint32.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image
from typing_extensions import TypedDict

from d2v_composer.data.modality import Modality, Stored
from d2v_composer.models.provenance import Json, Record
from d2v_composer.sources import CHOOSE, CHOOSE_LABELS
from d2v_composer.system.errors import InputError, reading
from d2v_composer.system.files import read_json
from d2v_composer.system.progress import progress_bar

INDEX = "index.json"
SUMMARY = "conversion.json"
# At most this many shards are read for the alignment, so that few are fetched from a store; we write 64 MiB each.
ALIGNMENT_SHARDS = 64


class Summary(TypedDict, total=False):
    """The fields that are read from ``conversion.json``, which a conversion writes beside the index."""

    classes: list[Json] | None
    lengths: list[int]


def _read_pil(data: bytes) -> Image.Image:
    width, height, mode_size = np.frombuffer(data[:12], np.uint32).tolist()
    if width * height > 8 * len(data):  # Pillow allocates them first; mode 1 has 8 pixels in a byte
        raise ValueError(f"its {len(data)} bytes do not fit {width} x {height} pixels")
    return Image.frombytes(data[12 : 12 + mode_size].decode(), (width, height), data[12 + mode_size :])


def _number(dtype: str) -> Callable[[bytes], int | float]:
    return lambda data: np.frombuffer(data, dtype)[0].item()


NUMBERS = [*(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32", "float64"]
ENCODINGS: dict[str, Callable[[bytes], Stored]] = {
    **dict.fromkeys(("bytes", "jpeg", "png"), bytes),  # files, which we decode only with decoders that we allow
    "pil": _read_pil,
    **{dtype: _number(dtype) for dtype in NUMBERS},
    "int": _number("int64"),
    "str": bytes.decode,
    "str_int": int,
}


class ShardFile(NamedTuple):
    """The entry of a shard's file in an index."""

    basename: str
    bytes: int
    hashes: Mapping[str, str]
    """Name of an algorithm of hashlib or xxhash → hash of the file's content, in hexadecimal; may be empty."""

    def find_fault(self, path: Path) -> str | None:
        """Return an error message if the file at ``path`` differs from this entry; otherwise ``None``."""
        if (size := path.stat().st_size) != self.bytes:
            return f"{path} has {size} bytes, but the index says {self.bytes}"
        # Of several hashes, those of xxhash take the least time.
        for algorithm in sorted(self.hashes, key=lambda name: not name.startswith("xxh"))[:1]:
            content = path.read_bytes()
            ours = algorithm in xxhash.algorithms_available
            digest = getattr(xxhash, algorithm)(content) if ours else hashlib.new(algorithm, content)
            if digest.hexdigest() != self.hashes[algorithm]:
                return f"{path}: the content does not have the {algorithm} hash in the index"
        return None


class Shard(NamedTuple):
    """The entry of a shard in an index."""

    samples: int
    raw: ShardFile
    zipped: ShardFile | None
    compression: str | None
    columns: list[tuple[str, int | None, Callable[[bytes], Stored] | None]]
    """Name, size in bytes (``None`` if it varies) and decoder (``None`` if the column is not read) of each column."""

    def read(self, path: Path, number: int) -> dict[str, Stored]:
        """Return column → value of a sample, for each column that has a decoder."""
        with path.open("rb", buffering=0) as file:
            file.seek(4 * (1 + number))
            begin, end = np.frombuffer(file.read(8), np.uint32).tolist()
            if not begin < end <= self.raw.bytes:
                raise ValueError(
                    f"the sample's offsets, {begin} and {end}, do not fit a shard of {self.raw.bytes} bytes"
                )
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
            raise ValueError(f"the sample has {len(data)} bytes, but its columns have {at}")
        return sample


class Index:
    """The parsed and checked index of an MDS data set.

    Args:
        folder: The folder that contains ``index.json``; for a data set in a store, the folder that caches it.
        modality: Modality of the samples.
        column: The column that holds the samples; default: the modality's name.
        labels: The column that holds the labels; default: no labels.
        remote: Address of the data set, if it is in a store.
    """

    def __init__(
        self,
        folder: Path,
        modality: Modality,
        column: str | None = None,
        *,
        labels: str | None = None,
        remote: str | None = None,
    ) -> None:
        self.folder, self.remote, self.modality = folder, remote and remote.rstrip("/"), modality
        self.column, self.labels = column or modality.name, labels
        if not is_mds(folder):
            fault = f"not an MDS data set: it has no {INDEX} that lists shards" if folder.is_dir() else "no such folder"
            raise InputError(f"{folder}: {fault}")
        with reading(folder / INDEX):
            self.shards = [self._parse(entry) for entry in json.loads((folder / INDEX).read_bytes())["shards"]]
        if not self.shards:
            raise InputError(f"{self.source}: {INDEX} lists no samples")

    def __len__(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def source(self) -> str:
        """Address of a data set in a store; folder of a local data set."""
        return self.remote or str(self.folder)

    @cached_property
    def lengths(self) -> NDArray[np.int64] | None:
        """Lengths of the clips in ``conversion.json``, in samples at 16 kHz, (N,) int64; ``None`` for images."""
        if not self.modality.has_lengths:
            return None
        lengths = np.array(self._listed_lengths, np.int64)
        if len(lengths) != len(self):
            raise InputError(
                f"{self.source}: expected the lengths of {len(self)} samples in {SUMMARY}, got {len(lengths)}; convert "
                "the data set with d2v convert-audio"
            )
        return lengths

    @cached_property
    def sha256(self) -> str:
        """SHA-256, in hexadecimal, of the sizes and hashes of the shards and the lengths of clips.

        If the index has no hashes, local shards are read and hashed; shards in a store are hashed by size alone.
        """
        shards = progress_bar(self.shards, desc="hashing", unit="shards")
        contents: list[Json] = [(shard.samples, shard.raw.bytes, self._hashes(shard)) for shard in shards]
        contents += self._listed_lengths if self.modality.has_lengths else []
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

    @property
    def has_hashes(self) -> bool:
        """True if ``sha256`` depends on the content of every shard."""
        return self.remote is None or all(shard.raw.hashes for shard in self.shards)

    def describe(self) -> Record:
        """Return the data set's modality, location, hash, and numbers of samples and shards."""
        place = {"modality": self.modality.name, "location": self.source}
        return {**place, "sha256": self.sha256, "samples": len(self), "shards": len(self.shards)}

    @property
    def _listed_lengths(self) -> list[int]:
        """The lengths in ``conversion.json``; empty if the file or its lengths are missing."""
        path = self.folder / SUMMARY
        return read_json(path, Summary).get("lengths", []) if path.exists() else []

    def _hashes(self, shard: Shard) -> Mapping[str, str]:
        if shard.raw.hashes or self.remote is not None:
            return shard.raw.hashes
        path = self.folder / shard.raw.basename
        if shard.zipped and (zipped := self.folder / shard.zipped.basename).is_file():
            path = zipped  # it stays when it is decompressed
        with reading(path):
            return {"xxh128": xxhash.xxh128_hexdigest(path.read_bytes())}

    def _parse(self, entry: Record) -> Shard:
        raw, zipped = (entry[kind] and ShardFile(**entry[kind]) for kind in ("raw_data", "zip_data"))
        for file in filter(None, (raw, zipped)):
            if Path(file.basename).is_absolute() or ".." in Path(file.basename).parts:
                raise InputError(f"{self.source}: its {INDEX} names a file outside the folder: {file.basename}")
        encodings = dict(zip(entry["column_names"], entry["column_encodings"], strict=True))
        if "pkl" in encodings.values():
            raise InputError(f"{self.source} has a column of pickles, which are not supported: they may run code")
        wanted = {self.column: self.modality.encodings} | ({} if self.labels is None else {self.labels: ENCODINGS})
        for name, known in wanted.items():
            if name not in encodings:
                choose = CHOOSE if name == self.column else CHOOSE_LABELS
                raise InputError(
                    f"{self.source}: no column {name!r}; the data set has the columns {', '.join(encodings)}; {choose}"
                )
            if encodings[name] not in known:
                raise InputError(
                    f"{self.source}: its column {name!r} is encoded as {encodings[name]}; expected one of "
                    f"{', '.join(known)}"
                )
        # Each sample takes at least the four bytes of its offset; a larger number would take memory for no samples.
        if not 0 < 4 * entry["samples"] <= raw.bytes:
            raise InputError(
                f"{self.source}: its {INDEX} claims {entry['samples']} samples in a shard of {raw.bytes} bytes"
            )
        if self.remote is None:
            self._check_file(*filter(None, (raw, zipped)))
        decoders = [ENCODINGS[encoding] if name in wanted else None for name, encoding in encodings.items()]
        columns = list(zip(encodings, entry["column_sizes"], decoders, strict=True))
        return Shard(entry["samples"], raw, zipped, entry["compression"], columns)

    def _check_file(self, *files: ShardFile) -> None:
        for file in files:
            if (path := self.folder / file.basename).is_file():
                if (size := path.stat().st_size) != file.bytes:
                    raise InputError(f"{path}: the shard has {size} bytes, but the index says {file.bytes}")
                return
        raise InputError(f"{self.folder / files[0].basename}: the shard is missing")


def choose_alignment_samples(index: Index, seed: int, max_samples: int, batch_size: int) -> NDArray[np.int64]:
    """Choose at most ``max_samples`` random samples to which an alignment is fitted.

    The samples come from at most :data:`ALIGNMENT_SHARDS` shards.

    Returns:
        Indices of the samples, (number of batches, samples per batch) int64, with at most ``batch_size`` per batch.
    """
    rng, ends = np.random.default_rng(seed), np.cumsum([shard.samples for shard in index.shards])
    shards, chosen = np.split(np.arange(ends[-1]), ends[:-1]), min(ALIGNMENT_SHARDS, len(ends))
    numbers = np.concatenate([shards[i] for i in np.sort(rng.choice(len(ends), chosen, replace=False))])
    numbers = np.sort(rng.choice(numbers, min(max_samples, len(numbers)), replace=False))
    if index.lengths is not None:
        numbers = numbers[np.argsort(index.lengths[numbers], kind="stable")]
    batch_size = max(1, min(batch_size, len(numbers)))
    return numbers[: len(numbers) // batch_size * batch_size].reshape(-1, batch_size)


def is_mds(folder: Path) -> bool:
    """Return True if a folder has an ``index.json`` that lists shards or is not valid JSON."""
    if not (folder / INDEX).is_file():
        return False
    try:
        index = json.loads((folder / INDEX).read_bytes())
    except (RecursionError, ValueError):
        return True
    return isinstance(index, dict) and "shards" in index
