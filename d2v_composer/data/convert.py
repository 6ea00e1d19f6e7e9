"""Convert image files to MDS shards, on disk or directly in an object store, all or nothing.

One job makes one shard. The images of each shard are planned beforehand from the seed and the file sizes, so the result
does not depend on the number of workers, and an interrupted conversion resumes. A shard's record is written after the
shard; the index, without which there is no data set, comes last, when every shard was read back.
"""

import csv
import hashlib
import io
import json
import logging
import shutil
import struct
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from streaming import MDSWriter
from streaming.base.format.mds import MDSReader
from streaming.base.hashing import get_hash
from streaming.base.storage import CloudUploader
from streaming.base.util import retry
from tqdm import tqdm
from typing_extensions import Self

from d2v_composer.data.images import (
    SUFFIXES,
    ImageFile,
    is_of_machine,
    list_images,
    list_subfolders,
    open_image,
    read_image_file,
    to_rgb,
)
from d2v_composer.data.index import INDEX, SUMMARY, describe_data, read_index
from d2v_composer.data.labeled import LabeledImages, load_labeled_set
from d2v_composer.system.command_line import progress_bar
from d2v_composer.system.errors import InputError, UnreadableImageError, reason
from d2v_composer.system.fetch import cache_folder, is_remote
from d2v_composer.system.fetch import download_existing as download
from d2v_composer.system.files import find_unwritable, sole_user, write_atomically
from d2v_composer.system.processes import FORK, end_with_parent, end_workers

# MERGED FROM d2v_composer/data/convert.py: Write a data set to a folder or an object store, in which each file

ATTEMPTS = 6  # to upload or read back a file: half a minute with Streaming's back-off


class Destination(NamedTuple):
    """The place of a data set. Readers look for its index, so the index must not appear before it is complete."""

    address: str
    remote: bool
    work: Path
    """The local folder of an unfinished conversion: records of finished shards, and files being written."""

    @classmethod
    def at(cls, address: str) -> Self:
        """Return the destination at a path or an object store's address.

        Raises:
            InputError: The address is malformed.
        """
        if is_remote(address):
            address = address.rstrip("/")
            return cls(address, True, _conversions() / hashlib.sha256(address.encode()).hexdigest()[:16])
        return cls(address, False, Path(address).resolve() / ".converting")

    @property
    def lock(self) -> Path:
        """The file that a conversion on this machine locks."""
        identity = hashlib.sha256(str(self.work.absolute()).encode()).hexdigest()[:16]
        return _conversions() / f"{identity}.lock"

    def open(self) -> None:
        """Check that the destination can be written and read, and holds no finished data set.

        Raises:
            InputError: One of these does not hold.
        """
        self._refuse_finished()
        folder = Path(self.address)
        if not self.remote and folder.is_dir() and any(folder.iterdir()) and not self.work.is_dir():
            raise InputError(f"{folder}: is not empty, and holds no interrupted conversion")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self.publish_text(SUMMARY, json.dumps({"finished": False}))
        except Exception as error:
            raise InputError(f"{self.address}: cannot be written ({reason(error)})") from error
        with self.read_back(SUMMARY) as path:
            if not path.exists():
                raise InputError(f"{self.address}: can be written, but what was written cannot be read back")
        self._refuse_finished()  # again: an index that could not be read is not necessarily missing

    def _refuse_finished(self) -> None:
        with self.read_back(INDEX) as path:
            if path.exists():
                shutil.rmtree(self.work, ignore_errors=True)  # killed between writing the index and close()
                raise InputError(f"{self.address}: has a finished data set: remove it, or choose another OUT")

    def close(self) -> None:
        """Remove the work folder."""
        shutil.rmtree(self.work)

    @contextmanager
    def published(self, name: str) -> Iterator[Path]:
        """Yield a path to write to, and publish the file, if there is one, when the block ends."""
        folder = _empty_folder(self.work / f"{name}.writing")
        # Before the file is written: the uploader requires an empty folder, and checks that the bucket exists.
        uploader = None
        if self.remote:
            uploader = CloudUploader.get((str(folder), self.address), keep_local=True, retry=ATTEMPTS)
        yield folder / name
        if (folder / name).exists():
            if uploader is not None:
                uploader.upload_file(name)
            else:
                (folder / name).replace(Path(self.address) / name)
        shutil.rmtree(folder)

    def publish_text(self, name: str, text: str) -> None:
        """Publish a text file."""
        with self.published(name) as path:
            path.write_text(text)

    @contextmanager
    def read_back(self, name: str, attempts: int = 1) -> Iterator[Path]:
        """Yield a local path to a published file; it does not exist if the file is missing or unreachable."""
        if not self.remote:
            yield Path(self.address) / name
            return
        folder = _empty_folder(self.work / f"{name}.reading")
        try:
            with suppress(InputError):
                retry(InputError, num_attempts=attempts)(download)(f"{self.address}/{name}", folder / name)
            yield folder / name
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def names(self, prefix: str) -> list[str]:
        """Return the sorted names of the published files with a prefix.

        Raises:
            InputError: Access is denied, or Streaming cannot list this kind of store (it lists S3, GCS and OCI).
        """
        if not self.remote:
            return sorted(path.name for path in Path(self.address).glob(f"{prefix}*"))
        folder = _empty_folder(self.work / "listing")
        try:
            keys = CloudUploader.get((str(folder), self.address)).list_objects(prefix)
        except Exception as error:
            raise InputError(f"{self.address}: cannot be listed ({reason(error)})") from error
        return sorted(key.rsplit("/", 1)[-1] for key in keys)


def _conversions() -> Path:
    return cache_folder() / "conversions"


def _empty_folder(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# MERGED FROM d2v_composer/data/convert.py: Find the images of a folder and their labels: ImageNet's layouts, or

LAYOUTS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", ".")
SPLITS = ("train", "val", "validation", "test")
NO_LABELS = "none"


class ImageSource(NamedTuple):
    """The images of a folder."""

    root: Path
    files: list[ImageFile]
    """The images by path; all have a label, or none has."""
    classes: list[str] | None
    """The name of each label; ``None`` if the labels have no names."""
    ignored: dict[str, int]
    """The number of other files by suffix."""


def find_images(source: str | Path, split: str = "train", labels: str | Path | None = None) -> ImageSource:
    """List the images of a data set.

    The images are in SOURCE/ILSVRC/Data/CLS-LOC/SPLIT (Kaggle's archive), SOURCE/Data/CLS-LOC/SPLIT,
    SOURCE/CLS-LOC/SPLIT or SOURCE/SPLIT; without any split, in SOURCE itself. There, a folder per class gives the
    labels: 0, 1, … in the order of the class names, which are those of the train folder for every split. A flat folder
    needs a labels file:

    - Kaggle's LOC_SPLIT_solution.csv (``ImageId,PredictionString``; the class is the string's first word), or any CSV
      file with the image in the first column and the class in the second;
    - a text file with a line ``filename label`` per image.

    An image is named with or without its suffix. A label is a class name or, in every line, a number from 0. The file
    is SPLIT.txt, SPLIT_labels.txt, labels.txt or Kaggle's; in SOURCE, next to the folder or in it, unless ``labels``
    names another. The ground truth file of ILSVRC's devkit is refused: it has no file names, and its numbers, 1 to
    1000, are not in the order of the train folder's classes.

    Args:
        source: The folder.
        split: The split's folder.
        labels: A labels file, or ``none`` for images without labels.

    Raises:
        InputError: There are no images, or their labels are ambiguous.
    """
    source = Path(source)
    if not source.is_dir():
        raise InputError(f"{source}: {'is not a folder' if source.exists() else 'no such folder'}")
    root = _split_folder(source, split)
    files, ignored = list_images(root)
    is_flat = all("/" not in file.path for file in files)
    labels_file = _labels_file(source, root, split, labels, is_flat)
    if labels_file is not None:
        names = _labels_of_file(labels_file, files, is_flat)
    elif labels == NO_LABELS or is_flat:
        return ImageSource(root, files, None, ignored)
    else:
        names = _labels_of_folders(root, files)
    known = _train_classes(source, root)
    if labels_file is not None and all(name.isdecimal() for name in names) and not known.issuperset(names):
        classes, numbers = None, [int(name) for name in names]
        if known and max(numbers) >= len(known):
            raise InputError(
                f"{labels_file}: has the label {max(numbers)}; the train folder's classes are 0 to {len(known) - 1}"
            )
    else:
        if known and not known.issuperset(names):
            raise InputError(f"{root}: the train folder has no class {min(set(names) - known)!r}")
        classes = sorted(known or set(names))
        number = {name: label for label, name in enumerate(classes)}
        numbers = [number[name] for name in names]
    labeled = [file._replace(label=label) for file, label in zip(files, numbers, strict=True)]
    return ImageSource(root, labeled, classes, ignored)


def _split_folder(source: Path, split: str) -> Path:
    for layout in LAYOUTS:
        if (source / layout / split).is_dir():
            return source / layout / split
    present = [name for name in SPLITS for layout in LAYOUTS if (source / layout / name).is_dir()]
    if split == "train" and not present:
        return source
    hint = f"there is: {', '.join(present)}" if present else "omit --split if the folder itself is the split"
    raise InputError(f"{source}: no split {split!r}; {hint}")


def _labels_file(source: Path, root: Path, split: str, labels: str | Path | None, is_flat: bool) -> Path | None:
    if labels == NO_LABELS:
        return None
    if labels is not None:
        if not Path(labels).is_file():
            raise InputError(f"{labels}: no such labels file")
        return Path(labels)
    names = (f"LOC_{split}_solution.csv", f"{split}.txt", f"{split}_labels.txt", "labels.txt")
    candidates = [folder / name for folder in (source, root, root.parent) for name in names]
    return next((path for path in candidates if is_flat and path.is_file()), None)


def _labels_of_file(path: Path, files: list[ImageFile], is_flat: bool) -> list[str]:
    try:
        labels = dict(_read_labels(path))
    except (ValueError, IndexError, csv.Error) as error:
        raise InputError(
            f"{path}: not a labels file: each line must be 'filename label', or it is Kaggle's LOC_val_solution.csv "
            "(the bare numbers of ILSVRC's devkit are not in the order of the classes)"
        ) from error
    if is_flat:
        labels = {PurePosixPath(name).name: label for name, label in labels.items()}
    keys = [_without_suffix(file.path) for file in files]
    unlabeled = next((file.path for file, key in zip(files, keys, strict=True) if key not in labels), None)
    if unlabeled is not None:
        raise InputError(f"{path}: no label for {unlabeled}")
    absent = labels.keys() - set(keys)
    if absent:
        raise InputError(f"{path}: {len(absent)} of its images are not in the folder, the first is {min(absent)}")
    return [labels[key] for key in keys]


def _read_labels(path: Path) -> Iterable[tuple[str, str]]:
    with open(path, newline="", encoding="utf-8-sig") as lines:
        if path.suffix.lower() == ".csv":
            rows = ((row[0], row[1].split()[0]) for row in csv.reader(lines) if row and row[0] != "ImageId")
        else:
            fields = (line.rsplit(maxsplit=1) for line in lines if line.strip())
            rows = ((name, label) for name, label in fields)
        for name, label in rows:
            yield _without_suffix(name.strip()), label


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in SUFFIXES else str(path)


def _labels_of_folders(root: Path, files: list[ImageFile]) -> list[str]:
    stray = next((file.path for file in files if "/" not in file.path), None)
    if stray is not None:
        raise InputError(
            f"{root / stray}: lies next to class folders and has no class; --labels {NO_LABELS} ignores the classes"
        )
    names = [file.path.split("/", 1)[0] for file in files]
    empty = sorted(set(list_subfolders(root)) - set(names))
    if empty:
        raise InputError(f"{root / empty[0]}: a class folder without images; --labels {NO_LABELS} ignores the classes")
    return names


def _train_classes(source: Path, root: Path) -> set[str]:
    """Return the classes of the train folder; none if it is this folder or does not exist."""
    train = next((source / layout / "train" for layout in LAYOUTS if (source / layout / "train").is_dir()), root)
    return set() if train == root else set(list_subfolders(train))


# MERGED FROM d2v_composer/data/convert.py: Convert any image file to an RGB JPEG.

JPEG_KINDS = {"RGB": None, "L": "grayscale"}


def as_rgb_jpeg(encoded: bytes, source: str, resize: int | None, quality: int) -> tuple[bytes, str | None]:
    """Convert an image file to an RGB JPEG that every reader decodes.

    An RGB JPEG with valid EXIF, or none, keeps its bytes. Other files, and those resized, are encoded again without
    metadata. An EXIF orientation is not applied (except a TIFF's, by Pillow): torchvision's ImageFolder and readers of
    the original bytes ignore it too, so an image looks the same either way.

    Args:
        encoded: The file's bytes.
        source: The name of the image for the error.
        resize: Shrink a longer short side to this many pixels.
        quality: The quality of a JPEG that is encoded again.

    Returns:
        The JPEG, and the kind of the original if it was not a plain RGB JPEG: ``PNG``, ``CMYK``, ``grayscale``,
        ``broken EXIF``, …

    Raises:
        UnreadableImageError: The image is truncated, corrupt or not an image. A fault of the machine is raised as it
            is.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = open_image(encoded)
            kind = _odd_kind(image)
            image.load()
            if kind is None and _exif_is_broken(image):
                kind = "broken EXIF"
            rgb = _shrink(to_rgb(image), resize)
            if kind is None and rgb is image:
                return encoded, None
            buffer = io.BytesIO()
            # A new image: the original would pass on its comment and its profile.
            Image.fromarray(np.asarray(rgb)).save(buffer, "JPEG", quality=quality)
    except Exception as error:
        if is_of_machine(error):
            raise
        reason = str(error).strip().splitlines()
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else reason[0] if reason else repr(error)
        raise UnreadableImageError(f"{source}: cannot be read ({reason}; {len(encoded)} bytes)") from error
    return buffer.getvalue(), kind


def _odd_kind(image: Image.Image) -> str | None:
    if image.format not in ("JPEG", "MPO"):  # MPO: a camera's JPEG followed by more pictures
        return image.format
    return JPEG_KINDS.get(image.mode, image.mode)


def _exif_is_broken(image: Image.Image) -> bool:
    # Parse it again: opening the image has parsed it, and ignored the errors.
    exif = Image.Exif()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            exif.load(image.info.get("exif", b""))
            list(exif.items())
        except (SyntaxError, ValueError, TypeError, LookupError, OSError, EOFError, ArithmeticError, struct.error):
            return True
    return bool(caught)


def _shrink(image: Image.Image, short_side: int | None) -> Image.Image:
    if short_side is None or min(image.size) <= short_side:
        return image
    width, height = (max(short_side, round(side * short_side / min(image.size))) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


# MERGED FROM d2v_composer/data/convert.py: Write CIFAR-10 as MDS, with its images' pixels unchanged.

# Time for another process to write the same images.
LOCK_SECONDS = 600.0
COLUMNS = {"image": "bytes", "label": "int"}


def convert_cifar10(images: Path, out: Path, num_train: int = 50_000, num_test: int = 10_000) -> None:
    """Write the first images of each split to ``out``/train and ``out``/test, unless they exist.

    Args:
        images: The folder of torchvision's CIFAR-10, which is downloaded to it if it is absent.
        out: A folder.
        num_train: Number of training images.
        num_test: Number of test images.

    Raises:
        InputError: CIFAR-10 is absent and cannot be downloaded, or is corrupt; or ``out`` cannot be written, or holds
            other files or another number of images.
    """
    wanted = {"train": num_train, "test": num_test}
    if all(_is_written(out / split, num_images) for split, num_images in wanted.items()):
        return
    if (fault := find_unwritable(out)) is not None:
        raise InputError(f"{out}: {fault}")
    lock = out / ".lock"
    with sole_user(lock, LOCK_SECONDS) as alone:
        if not alone:
            raise InputError(f"{out}: another conversion is writing there")
        _write_missing(images, out, wanted)
        lock.unlink()


def _write_missing(images: Path, out: Path, wanted: dict[str, int]) -> None:
    # Another process may have written them while this one waited.
    missing = [split for split, num_images in wanted.items() if not _is_written(out / split, num_images)]
    if not missing:
        return
    cifar10 = load_labeled_set("cifar10", images, image_size=32, interpolation="bicubic", download=True)
    for split in missing:
        _write(getattr(cifar10, split), wanted[split], out / split)


def _is_written(folder: Path, num_images: int) -> bool:
    """Tell whether a split is there, and refuse a folder of anything else."""
    if not (folder / INDEX).exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder}: exists, and has no {INDEX}: remove it, or choose another folder")
        return False
    found = describe_data(read_index(folder, columns=tuple(COLUMNS)))["samples"]
    if found != num_images:
        raise InputError(f"{folder}: has {found} images, not {num_images}: remove it, or choose another folder")
    return True


def _write(labeled: LabeledImages, num_images: int, folder: Path) -> None:
    from PIL import Image
    from streaming import MDSWriter  # takes seconds

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with MDSWriter(out=str(partial), columns=COLUMNS, hashes=["xxh64"]) as writer:
        for pixels, label in zip(labeled.images[:num_images], labeled.labels[:num_images].tolist(), strict=True):
            buffer = io.BytesIO()
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, "PNG")
            writer.write({"image": buffer.getvalue(), "label": label})
    partial.replace(folder)


# MERGED FROM d2v_composer/data/convert.py: Plan, write and verify single shards.

WRITTEN_HASHES = ["sha1", "xxh64"]
LARGEST_SHARD = (1 << 32) - 1
# A resized JPEG has 0.3 bytes per pixel, at an aspect ratio of 4:3. Only the size of shards depends on it.
BYTES_PER_SQUARE = 0.4


class Encoding(NamedTuple):
    """The encoding of stored images."""

    resize: int | None = None
    """Shrink a longer short side to this many pixels; ``None``: keep the files' bytes."""
    quality: int = 90
    """The quality of JPEGs that are encoded again."""


class ShardJob(NamedTuple):
    """A shard to write."""

    number: int
    root: Path
    files: list[ImageFile]
    encoding: Encoding
    skip_unreadable: bool
    destination: Destination


class ShardRecord(NamedTuple):
    """A finished shard."""

    number: int
    entry: dict[str, Any] | None
    """Its entry in the index; ``None`` if none of its images was readable."""
    converted: dict[str, int]
    skipped: list[str]


def plan_shards(
    files: Sequence[ImageFile], encoding: Encoding, seed: int, shard_bytes: int
) -> Iterator[list[ImageFile]]:
    """Yield the images of each shard of about ``shard_bytes``, in a random order."""
    largest_image = encoding.resize**2 * BYTES_PER_SQUARE if encoding.resize else LARGEST_SHARD
    shard: list[ImageFile] = []
    size = 0.0
    for i in np.random.default_rng(seed).permutation(len(files)):
        image_bytes = min(files[i].num_bytes, largest_image)
        if shard and size + image_bytes > shard_bytes:
            yield shard
            shard, size = [], 0.0
        shard.append(files[i])
        size += image_bytes
    yield shard


def convert_shard(job: ShardJob) -> ShardRecord:
    """Write and publish a shard, then write its record."""
    converted: Counter[str] = Counter()
    skipped: list[str] = []
    columns = {"image": "bytes"} if job.files[0].label is None else {"image": "bytes", "label": "int"}
    with job.destination.published(f"shard.{job.number:05}.mds") as path:
        writer = MDSWriter(
            columns=columns, out=str(path.parent / "mds"), hashes=WRITTEN_HASHES, size_limit=LARGEST_SHARD
        )
        for file in job.files:
            try:
                image, kind = _read_image(job, file)
            except UnreadableImageError as error:
                if not job.skip_unreadable:
                    raise InputError(f"{error}; --skip-unreadable skips such images") from error
                skipped.append(str(error).removeprefix(f"{job.root}/"))
                continue
            converted.update([kind] if kind else [])
            writer.write({"image": image, "label": file.label})
        entry = _close_shard(writer, path)
    record = ShardRecord(job.number, entry, dict(sorted(converted.items())), skipped)
    write_atomically(record_path(job.destination, job.number), json.dumps(record._asdict()))
    return record


def _read_image(job: ShardJob, file: ImageFile) -> tuple[bytes, str | None]:
    path = job.root / file.path
    try:
        return as_rgb_jpeg(read_image_file(path), str(path), job.encoding.resize, job.encoding.quality)
    except (OSError, MemoryError) as error:
        raise RuntimeError(f"{path}: cannot be read now ({reason(error)}): run again to resume") from error


def _close_shard(writer: MDSWriter, path: Path) -> dict[str, Any] | None:
    # Not writer.finish(), which writes an index: an unfinished data set must have none.
    if writer.new_samples:
        writer.flush_shard()
    writer.executor.shutdown()
    if not writer.shards:
        return None
    if len(writer.shards) > 1:
        raise RuntimeError(f"{path.name}: more than {LARGEST_SHARD} bytes of images: choose a smaller --shard-size")
    entry = writer.shards[0]
    (Path(writer.local) / entry["raw_data"]["basename"]).rename(path)
    entry["raw_data"]["basename"] = path.name
    return entry


def verify_shard(job: tuple[Destination, ShardRecord]) -> str | None:
    """Read a published shard back, and return its fault, if there is one."""
    destination, record = job
    assert record.entry is not None  # the shard was written
    raw, num_samples = record.entry["raw_data"], record.entry["samples"]
    shard = f"{destination.address}/{raw['basename']}"
    with destination.read_back(raw["basename"], ATTEMPTS) as path:
        if not path.exists():
            return f"{shard}: cannot be read back"
        content = path.read_bytes()
        if len(content) != raw["bytes"]:
            return f"{shard}: has {len(content)} bytes instead of {raw['bytes']}"
        if any(get_hash(name, content) != value for name, value in raw["hashes"].items()):
            return f"{shard}: its content has changed"
        found = sum(1 for sample in MDSReader.from_json(str(path.parent), None, record.entry) if sample["image"])
        return None if found == num_samples else f"{shard}: has {found} images instead of {num_samples}"


def record_path(destination: Destination, number: int) -> Path:
    """Return the path of a finished shard's record."""
    return destination.work / "records" / f"{number}.json"


def saved_records(destination: Destination) -> list[ShardRecord]:
    """Read the records of all published shards."""
    return [ShardRecord(**json.loads(path.read_bytes())) for path in record_path(destination, 0).parent.glob("*.json")]


def shard_names(destination: Destination) -> set[str]:
    """Return the names of all shards at the destination, those of other conversions too.

    Raises:
        InputError: The object store cannot be listed.
    """
    return {name for name in destination.names("shard.") if name.endswith(".mds")}


SHARD_BYTES = 1 << 26
LOCK_TIMEOUT = 10

log = logging.getLogger(__name__)

Job = TypeVar("Job")
ResultT = TypeVar("ResultT")


class Conversion(NamedTuple):
    """The result of a conversion."""

    out: str
    images: int
    classes: int | None
    """``None`` if the images have no labels."""
    bytes: int
    """The size of all shards."""
    shards: int
    converted: dict[str, int]
    """The number of images that were not RGB JPEGs, by kind."""
    skipped: list[str]
    """The reason for each unreadable image."""
    ignored: dict[str, int]
    """The number of other files in the source, by suffix."""
    resumed: int
    """The shards that an interrupted run had finished."""
    leftover: list[str] | None
    """Other shards at the destination, which are in no index; ``None`` if it cannot be listed."""


def convert_images(
    source: ImageSource,
    out: str | Path,
    encoding: Encoding,
    *,
    seed: int = 0,
    workers: int = 1,
    shard_bytes: int = SHARD_BYTES,
    skip_unreadable: bool = False,
) -> Conversion:
    """Write images to an MDS data set with the columns ``image`` (a JPEG's bytes) and, if known, ``label``.

    Args:
        source: The images; see :func:`find_images`.
        out: A folder, or an address in any store that mosaicml-streaming can write: s3://, gs://, …
        encoding: How to store the images.
        seed: The seed of the order.
        workers: Processes that convert.
        shard_bytes: The approximate size of a shard.
        skip_unreadable: Skip and list unreadable images instead of stopping.

    Raises:
        InputError: An image is unreadable, or ``out`` cannot be written or holds a data set.
        RuntimeError: A shard differs from what was written.
    """
    destination = Destination.at(str(out))
    if not destination.remote and destination.work.is_relative_to(source.root.resolve()):
        raise InputError(f"{out}: lies in the folder of the images, {source.root}")
    jobs = [
        ShardJob(number, source.root, files, encoding, skip_unreadable, destination)
        for number, files in enumerate(plan_shards(source.files, encoding, seed, shard_bytes))
    ]
    with sole_user(destination.lock, LOCK_TIMEOUT) as alone:
        if not alone:
            raise InputError(f"{destination.address}: another conversion is writing there")
        destination.open()
        resumed = _resume(destination, skip_unreadable, fingerprint=_fingerprint(source, encoding, seed, shard_bytes))
        with ProcessPoolExecutor(workers, FORK, _start_worker) as pool:
            records = _convert(pool, jobs, resumed)
            _verify(pool, destination, records, expected=len(source.files))
        conversion = _result(source, destination, records, len(resumed))
        summary = {"finished": True, "images": conversion.images, "seed": seed} | encoding._asdict()
        summary |= {"converted": conversion.converted, "skipped": conversion.skipped, "classes": source.classes}
        _publish(destination, summary, _entries(records))
    return conversion


def _resume(destination: Destination, skip_unreadable: bool, fingerprint: str) -> list[ShardRecord]:
    """Return the shards that an interrupted run of the same conversion has finished.

    The shards of another conversion are deleted from a folder. In an object store they are overwritten, or listed at
    the end: Streaming cannot delete, and writing does not require that permission.
    """
    plan, records = destination.work / "plan", destination.work / "records"
    if not plan.exists() or plan.read_text() != fingerprint:
        if not destination.remote:
            for name in shard_names(destination):
                (Path(destination.address) / name).unlink()
        shutil.rmtree(records, ignore_errors=True)
        write_atomically(plan, fingerprint)
    return [record for record in saved_records(destination) if skip_unreadable or not record.skipped]


def _fingerprint(source: ImageSource, encoding: Encoding, seed: int, shard_bytes: int) -> str:
    state = hashlib.sha256(repr((str(source.root.resolve()), encoding, seed, shard_bytes)).encode())
    for file in source.files:
        state.update(repr(tuple(file)).encode())
    return state.hexdigest()


def _convert(pool: ProcessPoolExecutor, jobs: list[ShardJob], resumed: list[ShardRecord]) -> list[ShardRecord]:
    done, records = {record.number for record in resumed}, list(resumed)
    missing = [job for job in jobs if job.number not in done]
    total = sum(len(job.files) for job in jobs)
    initial = total - sum(len(job.files) for job in missing)
    with progress_bar(total=total, initial=initial, desc="converting", unit="images") as bar:
        for job, record in _run(pool, convert_shard, missing):
            records.append(record)
            bar.update(len(job.files))
    return sorted(records)


def _verify(pool: ProcessPoolExecutor, destination: Destination, records: list[ShardRecord], expected: int) -> None:
    jobs = [(destination, record) for record in records if record.entry is not None]
    faults = []
    verified = _run(pool, verify_shard, jobs)
    for (_, record), fault in progress_bar(verified, total=len(jobs), desc="verifying", unit="shards"):
        if fault is not None:
            faults.append(fault)
            record_path(destination, record.number).unlink()
    if faults:
        raise RuntimeError(
            f"{len(faults)} of {len(jobs)} shards differ from what was written; run again to replace them: "
            f"{min(faults)}"
        )
    num_images = sum(entry["samples"] for entry in _entries(records))
    num_skipped = sum(len(record.skipped) for record in records)
    if num_images + num_skipped != expected:
        raise RuntimeError(f"{destination.address}: {num_images} images and {num_skipped} skipped ones of {expected}")
    if not num_images:
        raise InputError(f"{destination.address}: none of the {expected} images can be read")


def _run(
    pool: ProcessPoolExecutor, function: Callable[[Job], ResultT], jobs: Sequence[Job]
) -> Iterator[tuple[Job, ResultT]]:
    futures = {pool.submit(function, job): job for job in jobs}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    except KeyboardInterrupt:
        end_workers()  # in the middle of their shards, which take seconds
        raise KeyboardInterrupt("finished shards are kept, the same command resumes") from None
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise


def _start_worker() -> None:
    # Streaming's uploads show a bar too: a killed worker must not keep the lock of this process's bars.
    tqdm.set_lock(threading.RLock())
    end_with_parent()


def _result(source: ImageSource, destination: Destination, records: list[ShardRecord], resumed: int) -> Conversion:
    entries = _entries(records)
    labels = {file.label for file in source.files} - {None}
    converted = sum((Counter(record.converted) for record in records), Counter())
    try:
        leftover = sorted(shard_names(destination) - {entry["raw_data"]["basename"] for entry in entries})
    except InputError as error:
        log.warning("%s", error)
        leftover = None
    return Conversion(
        out=destination.address,
        images=sum(entry["samples"] for entry in entries),
        classes=len(source.classes or labels) or None,
        bytes=sum(entry["raw_data"]["bytes"] for entry in entries),
        shards=len(entries),
        converted=dict(sorted(converted.items())),
        skipped=[line for record in records for line in record.skipped],
        ignored=source.ignored,
        resumed=resumed,
        leftover=leftover,
    )


def _publish(destination: Destination, summary: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    index = json.dumps({"version": 2, "shards": entries}, sort_keys=True)
    destination.publish_text(SUMMARY, json.dumps(summary))
    destination.publish_text(INDEX, index)
    with destination.read_back(INDEX, ATTEMPTS) as path:
        if not path.exists() or path.read_text() != index:
            raise RuntimeError(f"{destination.address}/{INDEX}: cannot be read back as it was written")
    destination.close()


def _entries(records: list[ShardRecord]) -> list[dict[str, Any]]:
    return [record.entry for record in records if record.entry is not None]
