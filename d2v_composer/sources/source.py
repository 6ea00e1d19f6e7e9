"""Read samples by index from any source, in worker processes or threads."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import Self

from d2v_composer.data.modality import Modality, Stored, read_sample_file
from d2v_composer.models.provenance import Json
from d2v_composer.sources.mds import Index
from d2v_composer.sources.shards import Shards
from d2v_composer.system.errors import InputError, RunError, reading
from d2v_composer.system.fetch import File
from d2v_composer.system.processes import ALL, Part, die_with_parent

AHEAD = 64  # at most this many results of threads wait in memory
Int64Array = NDArray[np.int64]
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class PackedStrings(Sequence[str]):
    """A sequence of strings in one block of memory, which forked processes share."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [os.fsencode(string) for string in strings]
        self._ends = np.cumsum([0, *map(len, encoded)])
        self._bytes = b"".join(encoded)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]: no slices
        return os.fsdecode(self._bytes[self._ends[number] : self._ends[number + 1]])


@dataclass(frozen=True, kw_only=True)
class Source:
    """Samples of one modality in a fixed order, indexed from 0.

    Attributes:
        root: Folder or address of the source.
        modality: Modality of the samples.
        ids: Names of the N samples, such as paths below ``root``; or their indices in the source, (N,) int64.
        load: Function that returns a sample as it is stored, given its index.
        label: Function that returns the label of a sample, given its index; ``None`` without labels.
        class_names: Name of each label; empty if the names are unknown.
        sizes: Approximate size of each stored sample, in bytes, (N,) int64.
        fingerprints: A whole number for each sample, (N,) int64; a conversion resumes only if none has changed.
        content: Text that differs between sources; the same for all parts of a source.
        left_out: Kind of files that are left out → their number.
        keeps_files: True if a conversion writes the stored samples without encoding them.
        in_folders: True if a conversion shuffles the samples.
        part: The part of these samples that a command processes; ``ALL`` for all of them.
    """

    root: str
    modality: Modality
    ids: PackedStrings | Int64Array
    load: Callable[[int], Stored]
    label: Callable[[int], int] | None = None
    class_names: tuple[str, ...] = ()
    sizes: Int64Array
    fingerprints: Int64Array
    content: str
    left_out: Mapping[str, int] = field(default_factory=dict)
    keeps_files: bool = False
    in_folders: bool = False
    part: Part = ALL

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, number: int) -> str:
        """Return the name of a sample for error messages."""
        has_names = isinstance(self.ids, PackedStrings)
        return f"{self.root}/{self.ids[number]}" if has_names else f"sample {self.ids[number]} of {self.root}"

    def decode(self, number: int) -> Tensor:
        """Load and decode a sample; see :meth:`Modality.decode`.

        Raises:
            UnreadableSampleError: The sample cannot be decoded.
        """
        return self.modality.decode(self.load(number), self.name(number))

    __getitem__ = decode

    def select(self, numbers: Sequence[int] | Int64Array) -> Self:
        """Return a source of only the samples with the given indices, in the given order."""
        chosen = np.asarray(numbers, np.int64)
        load, label, ids = self.load, self.label, self.ids
        return replace(
            self,
            ids=PackedStrings(map(ids.__getitem__, chosen)) if isinstance(ids, PackedStrings) else ids[chosen],
            sizes=self.sizes[chosen],
            fingerprints=self.fingerprints[chosen],
            load=lambda number: load(int(chosen[number])),
            label=None if label is None else lambda number: label(int(chosen[number])),
        )

    def with_classes(self, names: Sequence[str], class_names: Sequence[str], hint: str) -> Self:
        """Return the source with labels: the position of each sample's class in ``class_names``.

        Args:
            names: Name of each sample's class, (N,).
            class_names: Names of all classes.
            hint: Advice at the end of the error message.

        Raises:
            InputError: A sample's class is not in ``class_names``.
        """
        places = {name: place for place, name in enumerate(class_names)}
        for number, name in enumerate(names):
            if name not in places:
                allowed = shorten(", ".join(class_names), 80, placeholder=" …")
                raise InputError(f"{self.name(number)}: expected one of the classes {allowed}; got {name!r}; {hint}")
        labels = np.array([places[name] for name in names], np.int64)
        return replace(self, label=lambda number: int(labels[number]), class_names=tuple(class_names))


class Columns(NamedTuple):
    """The columns to read from a file that holds many samples."""

    modality: Modality
    samples: str | None = None
    """Column of the samples; default: the only column that can hold samples."""
    labels: str | None = None
    """Column of the labels; default: no labels."""


class SampleListing(NamedTuple):
    """Samples of one file or folder; fields without a docstring are described in :class:`Source`."""

    ids: PackedStrings
    sizes: Int64Array
    fingerprints: Int64Array
    load: Callable[[int], bytes]
    labels: Sequence[Json]
    """Labels as stored, or paths of the samples; may be empty."""
    class_names: Sequence[str] = ()
    left_out: Mapping[str, int] = {}
    content: str = ""
    """Hash of the samples' files, if a column holds their paths; otherwise ''."""


def open_mds(index: Index, cache_limit: int | None = None) -> Source:
    """Open the samples of an MDS data set, with labels if ``index.labels`` is not ``None``."""
    shards = Shards(index, cache_limit=cache_limit)
    content = hash_of(index.sha256, index.column)

    def label(number: int) -> int:
        return whole_label(shards[number][index.labels or ""], f"sample {number} of {index.source}")

    return Source(
        root=index.source,
        modality=index.modality,
        ids=np.arange(len(index)),
        load=lambda number: shards[number][index.column],
        label=label if index.labels else None,
        sizes=np.full(len(index), sum(shard.raw.bytes for shard in index.shards) // len(index)),  # all may be copies
        fingerprints=fingerprints_of(len(index), content),
        content=content,
    )


def whole_label(value: Json, source: str) -> int:
    """Return a label as a whole number."""
    with suppress(TypeError, ValueError, OverflowError):
        if (label := int(value)) == float(value):
            return label
    raise InputError(f"{source}: its label must be a whole number, got {value!r:.40}")


def list_folder(root: Path, files: Sequence[File]) -> SampleListing:
    """List the given files of a folder as samples."""
    paths = PackedStrings(file.path for file in files)
    fingerprints = np.array([*map(fingerprint_of, files)], np.int64)
    sizes = np.array([file.size for file in files], np.int64)
    return SampleListing(paths, sizes, fingerprints, partial(load_listed, root, paths, fingerprints), [*paths])


def load_listed(folder: Path, paths: PackedStrings, fingerprints: Int64Array, number: int) -> bytes:
    """Read the file at ``paths[number]`` in a folder."""
    path = folder / paths[number]
    with reading(path):
        content = read_sample_file(path)
        if fingerprint_of(File.of(paths[number], path)) != fingerprints[number]:
            raise RunError(f"{path} has changed since it was listed; run the same command again")
        return content


def name_counts(left_out: Mapping[str, int]) -> str:
    """Return the counts and kinds of :attr:`Source.left_out` as text."""
    return ", ".join(f"{count:,} {kind}" for kind, count in left_out.items()) or "none"


def worker_options(num_workers: int, prefetch_factor: int, for_gpu: bool, timeout: float = 0) -> dict[str, Any]:
    """Return arguments of DataLoader for worker processes that prepare batches in advance.

    On Windows and macOS, and with 0 workers, the calling process prepares the batches. ``timeout`` is the number of
    seconds to wait for a batch; 0 for no limit.
    """
    options = {"pin_memory": for_gpu}  # pinning creates a CUDA context
    # Windows cannot fork; on macOS, a process with threads must not.
    if not num_workers or not hasattr(os, "fork") or sys.platform == "darwin":
        return options
    return options | {
        "num_workers": num_workers,
        "timeout": timeout,
        "prefetch_factor": prefetch_factor,
        "persistent_workers": True,
        "multiprocessing_context": "fork",
        "worker_init_fn": lambda _: die_with_parent(),
    }


def map_in_workers(
    function: Callable[[ItemT], ResultT], items: Sequence[ItemT], workers: int, for_gpu: bool = False
) -> Iterator[ResultT]:
    """Yield a function's result for each item, in order, computed by at most ``workers`` processes."""

    def call(item: ItemT) -> tuple[Any, Exception | None]:
        try:
            return function(item), None
        except (InputError, RunError) as problem:
            return None, problem

    options = worker_options(min(workers, len(items)) if len(items) > 1 else 0, 2, for_gpu)
    try:
        # Without a name, it ends with the loop: an error that torch raises would hold it, and its workers the lock.
        for result, problem in DataLoader(items, batch_size=None, collate_fn=call, **options):  # pyright: ignore[reportArgumentType]: items have a length
            if problem is not None:
                raise problem
            yield result
    except (OSError, RuntimeError) as error:
        cause = (str(error).strip() or type(error).__name__).splitlines()[-1]
        if isinstance(error, RuntimeError) and not cause.startswith("DataLoader worker (pid"):
            raise
        advice = "run the command again; if the machine's memory ran out, free memory or use fewer workers"
        raise RunError(f"reading failed ({cause}); {advice}") from error


def map_in_threads(function: Callable[[ItemT], ResultT], items: Sequence[ItemT]) -> Iterator[ResultT]:
    """Yield a function's result for each item, in order, computed by ``torch.get_num_threads()`` threads."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for start in range(0, len(items), AHEAD):
            yield from pool.map(function, items[start : start + AHEAD])


def fingerprints_of(count: int, *contents: object) -> Int64Array:
    """Return :attr:`Source.fingerprints` of ``count`` samples, computed from ``contents``."""
    return fingerprint_of(*contents) + np.arange(count)


def hash_of(*contents: object) -> str:
    """Return the SHA-256 of the ``repr`` of values, in hexadecimal."""
    return hashlib.sha256(repr(contents).encode()).hexdigest()


def fingerprint_of(*contents: object) -> int:
    """Return a hash of values as a whole number of 60 bits, for :attr:`Source.fingerprints`."""
    return int(hash_of(*contents)[:15], 16)
