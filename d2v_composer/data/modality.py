"""The base of modalities, which decode, store, augment and batch samples."""

import errno
import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Self

from d2v_composer.models.configs import EncoderConfig
from d2v_composer.models.provenance import Json
from d2v_composer.system.errors import UnreadableSampleError

Stored = Any
"""A sample as its source stores it: a file's bytes, or the value of a column."""
MAX_BYTES = 1 << 30  # limit of a file, because files are read whole


class Transform(Protocol):
    """An augmentation, which takes a sample as its source stores it, or as :meth:`Modality.decode` returns it."""

    @property
    def sample_bytes(self) -> int:
        """Size of the largest result, in bytes."""
        ...

    @property
    def longest(self) -> int | None:
        """Length of the longest result, in audio samples; ``None`` if all results have one size."""
        ...

    def __call__(self, sample: Stored, rng: np.random.Generator, source: str = "sample") -> Tensor: ...


class Modality(ABC):
    """Images or audio: how samples are decoded, stored, augmented and batched.

    Attributes:
        name: Name of the samples' entry in a batch, and of their column in an MDS data set.
        unit: The word for several samples in messages.
        cost_unit: The words for the amount of input for which a model's operations are counted.
        suffixes: Suffixes of the files that are samples.
        needs: Suffix → the package that Pillow needs to decode files with this suffix.
        encodings: The MDS encodings of a column that can hold samples.
        options: Fields of ``train_loader`` that are arguments of :meth:`augmentation`.
        batch_size: Default number of samples that are embedded at once.
        has_lengths: True if samples may differ in length.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    cost_unit: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    needs: ClassVar[Mapping[str, str]] = {}
    encodings: ClassVar[Collection[str]]
    options: ClassVar[frozenset[str]]
    batch_size: ClassVar[int]
    has_lengths: ClassVar[bool] = False

    @classmethod
    def of(cls, config: EncoderConfig) -> Self:
        """Build the modality for an encoder's config."""
        return cls()

    @classmethod
    def of_side(cls, side: int) -> Self:
        """Return the modality with images of this many pixels per side; audio stays unchanged."""
        return cls()

    @abstractmethod
    def decode(self, stored: Stored, source: str) -> Tensor:
        """Decode a whole sample.

        Args:
            stored: The sample as its source stores it.
            source: The sample's name for errors.

        Raises:
            UnreadableSampleError: The sample cannot be decoded.
        """

    @classmethod
    @abstractmethod
    def encode(cls, stored: Stored, source: str, **options: Json) -> tuple[bytes, int | None]:
        """Return a sample as a file's bytes, and the length of a clip in samples at 16 kHz, or ``None`` for an image.

        Raises:
            UnreadableSampleError: The sample cannot be decoded.
        """

    @abstractmethod
    def augmentation(self, for_views: bool, **options: Json) -> Transform:
        """Return the augmentation for training or, with ``for_views``, for the views of a sample in an evaluation."""

    def stack(self, samples: Iterator[Tensor], count: int) -> Tensor | list[Tensor]:
        """Collect ``count`` decoded samples in memory."""
        return list(samples)


def read_sample_file(path: Path) -> bytes:
    """Return the bytes of a sample's file."""
    if "\0" in str(path):
        raise UnreadableSampleError(f"{str(path)!r} is not a path")
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe could wait for ever
            raise UnreadableSampleError(f"{path} is not a regular file")
        if status.st_size > MAX_BYTES:
            raise UnreadableSampleError(f"{path} has {status.st_size:,} bytes; the limit is {MAX_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENAMETOOLONG):
            raise UnreadableSampleError(f"{path} cannot be read ({error.strerror})") from error
        raise


@contextmanager
def decoding(stored: object, source: str, kind: str) -> Iterator[None]:
    """Convert a decoder's error in a ``with`` block to one line that names the sample."""
    try:
        yield
    except UnreadableSampleError as error:
        raise UnreadableSampleError(f"{source}: {error}") from error
    except Exception as error:
        # The machine's own errors pass unchanged; a decoder's OSError has no errno.
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        detail = f"{len(stored)} bytes" if isinstance(stored, bytes) else f"{stored!r:.50}"
        raise UnreadableSampleError(f"{source}: cannot decode as {kind} ({detail})") from error


def sample_rng(seed: int, view: int, sample_id: int) -> np.random.Generator:
    """Return the random generator of one view of one sample."""
    return np.random.default_rng((seed, view, sample_id))


class Augmentation(NamedTuple):
    """A reproducible augmentation of samples in memory."""

    transform: Transform
    seed: int

    def __call__(self, sample: Tensor, *key: int) -> Tensor:
        """Augment a sample with random numbers that depend only on the seed and ``key``, two whole numbers."""
        return self.transform(sample, sample_rng(self.seed, *key))


class Samples(Protocol):
    """Samples by index: a list of tensors, or a map-style dataset of torch."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Any: ...  # what torchvision's transforms return is untyped


def collate(samples: Sequence[Tensor], sizes: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """Stack samples, padded with zeros at the end to one length; if any is padded, also return all lengths, (B,) int64.

    Args:
        samples: Samples whose shapes differ at most in the last dimension.
        sizes: Lengths to which samples may be padded, ascending; if all are too small, samples are padded to the
            length of the longest sample.
    """
    lengths = torch.tensor([sample.shape[-1] for sample in samples])
    longest = int(lengths.max())
    longest = next((size for size in sizes if size >= longest), longest)
    if longest == lengths.min():
        return (torch.stack(list(samples)),)
    return torch.stack([pad(sample, (0, longest - sample.shape[-1])) for sample in samples]), lengths
