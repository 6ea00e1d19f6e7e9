"""Find, decode, store, augment and show samples; a subclass of Modality does so for images or for sound."""

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import Self

from d2v_composer.models.sizes import EncoderConfig
from d2v_composer.system.errors import InputError, UnreadableSampleError

MOST_BYTES = 1 << 30  # of a file, which is read whole


class Transform(Protocol):
    """An augmentation of one sample, as it is stored or as :meth:`Modality.decode` returns it."""

    @property
    def sample_bytes(self) -> int:
        """Size of the largest result."""
        ...

    @property
    def longest(self) -> int | None:
        """Its length; ``None`` if all results have one size."""
        ...

    def __call__(self, sample: Any, rng: np.random.Generator, source: str = "sample") -> Tensor: ...


class Modality(ABC):
    """A kind of samples; a subclass's attributes are how a model takes them.

    Attributes:
        name: Name of the entry in a batch, and of the column in an MDS data set.
        unit: What messages call several samples.
        suffixes: Of the files that a folder's scan takes.
        needs: Suffix of files that cannot be decoded here → the package that can.
        columns: Name → encoding of the columns of a converted data set, beside the label.
        encodings: The encodings of a column that can be read.
        options: Fields of ``train_loader`` that are arguments of :meth:`augmentation`.
        batch_size: Samples that ``d2v embed`` embeds at once.
        has_lengths: True if :meth:`encode` returns a ``length`` too, which a converted data set's summary lists.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    needs: ClassVar[Mapping[str, str]] = {}
    columns: ClassVar[Mapping[str, str]]
    encodings: ClassVar[Collection[str]]
    options: ClassVar[frozenset[str]]
    batch_size: ClassVar[int]
    has_lengths: ClassVar[bool] = False

    @classmethod
    def of(cls, config: EncoderConfig) -> Self:
        """Return the modality as an encoder takes it."""
        return cls()

    @classmethod
    def shown(cls, side: int) -> Self:
        """Return the modality with samples that are small enough to look at; images of this many pixels a side."""
        return cls()

    @abstractmethod
    def decode(self, stored: Any, source: str) -> Tensor:
        """Decode a whole sample, for an evaluation.

        Args:
            stored: A file's bytes, or what a column holds.
            source: The sample's name for errors.

        Raises:
            UnreadableSampleError: It cannot be decoded.
        """

    @classmethod
    @abstractmethod
    def encode(cls, stored: Any, source: str, **options: Any) -> dict[str, Any]:
        """Return the values of :attr:`columns` for a sample of a converted data set, which every reader can decode.

        Raises:
            UnreadableSampleError: It cannot be decoded.
        """

    @abstractmethod
    def picture(self, sample: Tensor) -> Tensor:
        """Return a picture of a sample as matplotlib draws it: (height, width, 3) uint8, or (height, width) float."""

    def sound(self, sample: Tensor) -> bytes | None:
        """Return a FLAC file of a sample that can be heard."""
        return None

    @abstractmethod
    def words(self) -> dict[str, str]:
        """Return what a model card says of samples and of models that take them: the hub's ``pipeline_tag`` and its
        ``tag``, the ``kind`` of model, ``one`` sample, ``each`` of what computation is counted for, how samples are
        ``prepared``, and a batch's ``shape``."""

    @abstractmethod
    def choices(self, on_gpu: bool) -> dict[str, Any]:
        """Return the settings of a run that ``d2v distill`` chooses for such samples, by dotted name."""

    @abstractmethod
    def kept(self, config: Any, held_out: bool) -> dict[str, Any]:
        """Return the options of :meth:`encode` that keep what a run with this config needs of samples."""

    @abstractmethod
    def augmentation(self, *, for_views: bool = False, **options: Any) -> Transform:
        """Return the training augmentation with these ``options``, or what makes views of a sample that differ."""

    def stack(self, samples: Iterator[Tensor], count: int) -> Tensor | list[Tensor]:
        """Return decoded samples in memory."""
        return list(samples)


class SampleFile(NamedTuple):
    """A file in a folder."""

    path: str
    """Relative to the folder, with slashes."""
    num_bytes: int
    mtime_ns: int
    label: int | None


def list_files(root: Path, modality: Modality | type[Modality]) -> tuple[list[SampleFile], dict[str, int]]:
    """List a modality's files in a folder and its subfolders, sorted by path, and count what is left out by its kind.

    Links are followed, but each file and each folder is listed once: by its own name, or by the first of several.
    Hidden files and folders are left out.

    Raises:
        InputError: There are none.
        OSError: A folder cannot be listed.
    """
    files, others, seen = list[SampleFile](), Counter[str](), set[object]()
    named, links = deque([root]), deque[Path]()
    while named or links:
        path = (named or links).popleft()
        # A dangling link counts as unreadable when it is read, as a corrupt file does.
        status = path.stat() if path.exists() else path.lstat()
        mode, suffix = status.st_mode, path.suffix.lower()
        is_folder = path is root or stat.S_ISDIR(mode)
        identity = (status.st_dev, status.st_ino) if status.st_ino else path.resolve()  # some file systems have none
        if not (is_folder or stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            others["special files"] += 1
        elif not is_folder and suffix not in modality.suffixes:
            needed = modality.needs.get(suffix)
            others[f"{suffix} (needs {needed})" if needed else suffix or "without suffix"] += 1
        elif identity in seen:
            others["links to files or folders already listed"] += 1
        elif is_folder:
            for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    others["hidden"] += 1
                else:
                    (links if entry.is_symlink() else named).append(Path(entry.path))
        else:
            name = path.relative_to(root).as_posix()
            files.append(SampleFile(name, status.st_size, status.st_mtime_ns, label=None))
        seen.add(identity)
    if not files:
        supported, found = ", ".join(modality.suffixes), name_counts(others)
        raise InputError(f"{root}: no {modality.unit}; supported suffixes are {supported}; other files: {found}")
    return sorted(files), dict(sorted(others.items()))


def list_subfolders(folder: Path) -> list[str]:
    """Return the sorted names of the subfolders that are not hidden."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def name_counts(others: Mapping[str, int]) -> str:
    """Return what :func:`list_files` left out, in words."""
    return ", ".join(f"{count:,} {kind}" for kind, count in others.items()) or "none"


def list_classes(folder: Path, modality: Modality | type[Modality]) -> list[str]:
    """Return the sorted names of the subfolders that are not hidden and hold files of a modality."""
    return [
        name
        for name in list_subfolders(folder)
        if any(path.suffix.lower() in modality.suffixes for path in (folder / name).rglob("[!.]*"))
    ]


def read_sample_file(path: Path) -> bytes:
    """Read a file.

    Raises:
        UnreadableSampleError: The file does not exist, is a dangling link, a pipe or the like, or too large.
        OSError: The machine cannot read (no permission, too many open files, a failing disk, …).
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe could wait for ever
            raise UnreadableSampleError(f"{path}: is not a regular file")
        if status.st_size > MOST_BYTES:
            raise UnreadableSampleError(f"{path}: has {status.st_size:,} bytes, more than {MOST_BYTES:,}")
        return path.read_bytes()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            raise UnreadableSampleError(f"{path}: cannot be read ({error.strerror})") from error
        raise


@contextmanager
def decoding(stored: Any, source: str, kind: str) -> Iterator[None]:
    """Convert any error raised in a ``with`` block that decodes a sample to one line that names the sample.

    Raises:
        UnreadableSampleError: It cannot be decoded. If memory or file descriptors run out, the error passes
            unchanged; the decoders' own OSErrors have no number.
    """
    try:
        yield
    except UnreadableSampleError as error:
        raise UnreadableSampleError(f"{source}: {error}") from error
    except Exception as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise
        detail = f"{len(stored)} bytes" if isinstance(stored, bytes) else f"mode {stored.mode}"
        raise UnreadableSampleError(f"{source}: not {kind} that can be read ({detail})") from error


def sample_rng(seed: int, epoch: int, sample_id: int) -> np.random.Generator:
    """Return the random generator of one sample in one epoch."""
    return np.random.default_rng((seed, epoch, sample_id))


def collate(samples: Sequence[Tensor], sizes: Sequence[int] = ()) -> tuple[Tensor, ...]:
    """Return a batch's inputs; and if samples were padded with zeros at the end, the lengths, (B,) int64.

    Args:
        samples: They differ at most in their last dimension.
        sizes: Lengths to pad to, ascending, because a compiled model needs a graph for each; else the longest sample's.
    """
    lengths = torch.tensor([sample.shape[-1] for sample in samples])
    longest = int(lengths.max())
    longest = next((size for size in sizes if size >= longest), longest)
    if longest == lengths.min():
        return (torch.stack(list(samples)),)
    return torch.stack([pad(sample, (0, longest - sample.shape[-1])) for sample in samples]), lengths
