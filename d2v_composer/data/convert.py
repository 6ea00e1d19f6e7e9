"""Convert images to MDS shards, in a folder or directly in an object store, all or nothing.

The images are cut into groups beforehand, from the seed and the file sizes. A worker turns a group into one shard and
writes a record of it. A conversion that starts again keeps the shards whose records fit. The index, without which there
is no data set, comes last. So the result depends neither on the number of workers nor on kills.
"""

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from streaming import MDSWriter
from streaming.base.format.base.reader import FileInfo
from streaming.base.storage import CloudUploader
from torch import Tensor

from d2v_composer.data.images import (
    SUFFIXES,
    ImageFile,
    decoding,
    list_images,
    list_subfolders,
    open_image,
    read_image_file,
    to_rgb,
)
from d2v_composer.data.index import INDEX, SUMMARY
from d2v_composer.data.labeled import load_labeled_set
from d2v_composer.data.shards import find_fault
from d2v_composer.system.command_line import progress_bar
from d2v_composer.system.errors import InputError, RunError, UnreadableImageError, reading, reason, writing
from d2v_composer.system.fetch import cache_folder, download_existing, is_remote
from d2v_composer.system.files import sole_user, write_atomically
from d2v_composer.system.processes import die_with_parent, if_interrupted

LAYOUTS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", ".")
SPLITS = ("train", "val", "validation", "test")
NO_LABELS = "none"
CIFAR10 = "cifar10:"
HASHES = ["sha1", "xxh64"]
# A resized JPEG has 0.3 bytes per pixel, at an aspect ratio of 4:3. Only the size of shards depends on it.
BYTES_PER_SQUARE = 0.4
ATTEMPTS = 6  # half a minute with Streaming's back-off
LOCK_SECONDS = 10.0


class ImageSource(NamedTuple):
    """The images of a folder, or of CIFAR-10."""

    root: Path
    files: list[ImageFile]
    """The images by path; all have a label, or none has."""
    classes: list[str] | None
    """The name of each label; ``None`` without labels."""
    ignored: dict[str, int]
    """The number of other files by suffix."""
    pixels: Tensor | None = None
    """CIFAR-10's images, (N, 3, 32, 32) uint8; the paths of ``files`` are their numbers."""


def find_images(source: str | Path, split: str = "train", labels: str | Path | None = None) -> ImageSource:
    """List the images of a data set.

    ``cifar10:FOLDER`` is torchvision's CIFAR-10, which is downloaded to FOLDER if it is missing there.

    The images of a folder are in SOURCE/ILSVRC/Data/CLS-LOC/SPLIT (Kaggle's archive), SOURCE/Data/CLS-LOC/SPLIT,
    SOURCE/CLS-LOC/SPLIT or SOURCE/SPLIT; without any split, in SOURCE itself. There, a folder per class gives the
    labels: 0, 1, … in the order of the class names, which are those of the train folder for every split. A flat folder
    needs a labels file:

    - Kaggle's LOC_SPLIT_solution.csv (``ImageId,PredictionString``; the class is the string's first word), or any CSV
      file with the image in the first column and the class in the second;
    - a text file with a line ``filename class`` per image.

    An image is named with or without its suffix. The file is SPLIT.txt, SPLIT_labels.txt, labels.txt or Kaggle's; in
    SOURCE, next to the folder or in it, unless ``labels`` names another. The ground truth file of ILSVRC's devkit is
    not supported: it has no file names, and its numbers are not in the order of the train folder's classes.

    Args:
        source: The folder, or ``cifar10:FOLDER``.
        split: The split's folder.
        labels: A labels file, or ``none`` for images without labels.

    Raises:
        InputError: There are no images, or their labels are ambiguous.
    """
    if str(source).startswith(CIFAR10):
        return _cifar10_images(Path(str(source).removeprefix(CIFAR10)), split)
    source = Path(source)
    if not source.is_dir():
        raise InputError(f"{source}: {'is not a folder' if source.exists() else 'no such folder'}")
    candidates = [(name, source / layout / name) for layout in reversed(LAYOUTS) for name in (*SPLITS, split)]
    folders = {name: folder for name, folder in candidates if folder.is_dir()}
    if split not in folders and (folders or split != "train"):
        hint = f"there is: {', '.join(folders)}" if folders else "omit --split if the folder itself is the split"
        raise InputError(f"{source}: no split {split!r}; {hint}")
    root = folders.get(split, source)
    files, ignored = list_images(root)
    if labels is None and not any("/" in file.path for file in files):
        names = (f"LOC_{split}_solution.csv", f"{split}.txt", f"{split}_labels.txt", "labels.txt")
        paths = [folder / name for folder in (source, root, root.parent) for name in names]
        labels = next((path for path in paths if path.is_file()), NO_LABELS)
    if labels == NO_LABELS:
        return ImageSource(root, files, None, ignored)
    classes = list_subfolders(folders.get("train", root))
    if labels is not None:
        names = _read_labels(Path(labels), files)
        classes = classes or sorted(set(names), key=lambda name: (len(name), name))  # numbers in their order
    else:
        names = [file.path.rpartition("/")[0].split("/")[0] for file in files]
        if "" in names:
            stray = root / files[names.index("")].path
            raise InputError(f"{stray}: is next to class folders, without a class; --labels none ignores these")
    if unknown := set(names) - set(classes):
        raise InputError(f"{labels or root}: the train folder has no class {min(unknown)!r}")
    number = {name: label for label, name in enumerate(classes)}
    labeled = [file._replace(label=number[name]) for file, name in zip(files, names, strict=True)]
    return ImageSource(root, labeled, classes, ignored)


def _cifar10_images(folder: Path, split: str) -> ImageSource:
    if split not in ("train", "test"):
        raise InputError(f"{CIFAR10}{folder}: no split {split!r}; there is: train, test")
    labeled = load_labeled_set("cifar10", folder, image_size=32, interpolation="bicubic", download=True)
    images, labels = getattr(labeled, split)
    files = [ImageFile(f"{i:05}", images[0].numel(), 0, label) for i, label in enumerate(labels.tolist())]
    return ImageSource(folder / split, files, list(labeled.class_names), {}, images)


def _read_labels(path: Path, files: list[ImageFile]) -> list[str]:
    labels: dict[str, str] = {}
    with reading(path):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    for row in (line.split(",") if path.suffix == ".csv" else line.rsplit(maxsplit=1) for line in lines):
        if len(row) < 2:
            raise InputError(
                f"{path}: not a labels file: each line must be 'filename label', or it is Kaggle's "
                "LOC_val_solution.csv (the bare numbers of ILSVRC's devkit are not in the order of the classes)"
            )
        name = _without_suffix(row[0].strip())
        labels[name] = labels[PurePosixPath(name).name] = row[1].split()[0]
    names = [_without_suffix(file.path) for file in files]
    if unlabeled := next((name for name in names if name not in labels), None):
        raise InputError(f"{path}: no label for {unlabeled}")
    return [labels[name] for name in names]


def _without_suffix(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_suffix("")) if path.suffix.lower() in SUFFIXES else str(path)


class Encoding(NamedTuple):
    """The encoding of stored images."""

    resize: int | None = None
    """Shrink a longer short side to this many pixels; ``None``: keep the files' bytes."""
    quality: int = 90
    """The quality of JPEGs that are encoded again."""


def as_rgb_jpeg(encoded: bytes, source: str, resize: int | None, quality: int) -> bytes:
    """Convert an image file to an RGB JPEG that every reader decodes.

    An RGB JPEG keeps its bytes. Other files, and those resized, are encoded again without metadata. An EXIF orientation
    is not applied (except a TIFF's, by Pillow): torchvision's ImageFolder and readers of the original bytes ignore it
    too, so an image looks the same either way.

    Args:
        encoded: The file's bytes.
        source: The image's name for errors.
        resize: Shrink a longer short side to this many pixels.
        quality: The quality of a JPEG that is encoded again.

    Raises:
        UnreadableImageError: The image cannot be decoded.
    """
    with decoding(encoded, source), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = open_image(encoded)
        rgb = to_rgb(image)
        if resize is not None and min(rgb.size) > resize:
            width, height = (max(resize, round(side * resize / min(rgb.size))) for side in rgb.size)
            rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
        if rgb is image and image.format in ("JPEG", "MPO"):  # MPO: a camera's JPEG followed by more pictures
            return encoded
        buffer = io.BytesIO()
        # A new image: the original would pass on its comment and its profile.
        Image.fromarray(np.asarray(rgb)).save(buffer, "JPEG", quality=quality)
        return buffer.getvalue()


class Shard(NamedTuple):
    """The record of a finished shard."""

    entry: dict[str, Any] | None
    """Its entry in the index; ``None`` if none of its images was readable."""
    skipped: list[str]
    existed: bool = False
    """An interrupted run had finished it."""


class Task(NamedTuple):
    """A conversion, as its workers inherit it."""

    source: ImageSource
    encoding: Encoding
    skip_unreadable: bool
    out: str
    is_remote: bool
    work: Path
    """The local folder of an unfinished conversion: records of finished shards, and files being written."""
    groups: list[NDArray[np.int64]]
    """The numbers of each shard's images."""
    records: Path
    """The folder of the records of these shards; other images or settings have another one."""

    def check(self) -> None:
        """Check that ``out`` can be written, and holds nothing but an interrupted conversion.

        Raises:
            InputError: One of these does not hold.
        """
        folder = Path(self.out)
        if self.is_remote:
            try:
                with self.published(INDEX):  # nothing is written, but the uploader asks for the bucket
                    is_finished = download_existing(f"{self.out}/{INDEX}", self.work / INDEX)
            except Exception as error:
                raise InputError(f"{self.out}: cannot be written ({reason(error)})") from error
        else:
            is_finished = (folder / INDEX).exists()
            if not is_finished and folder.is_dir() and any(folder.iterdir()) and not self.work.is_dir():
                raise InputError(f"{folder}: is not empty, and holds no interrupted conversion")
        if is_finished:
            shutil.rmtree(self.work, ignore_errors=True)  # if the conversion was killed after its index
            raise InputError(f"{self.out}: has a finished data set: remove it, or choose another OUT")

    @contextmanager
    def published(self, name: str) -> Iterator[Path]:
        """Yield a local path to write to, and publish the file, if there is one, when the block ends.

        Raises:
            RunError: The disk or the store fails.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        with writing(self.out), TemporaryDirectory(dir=self.work) as folder:
            uploader = CloudUploader.get((folder, self.out), retry=ATTEMPTS) if self.is_remote else None
            path = Path(folder, name)
            yield path
            if uploader is None:
                with suppress(FileNotFoundError):
                    os.replace(path, Path(self.out) / name)
            elif path.exists():
                try:
                    uploader.upload_file(name)
                except Exception as error:
                    raise RunError(f"{self.out}: cannot be written: {reason(error)}") from error

    def publish_json(self, name: str, content: dict[str, Any]) -> None:
        """Publish a JSON file."""
        with self.published(name) as path:
            path.write_text(json.dumps(content, sort_keys=True))

    def finish_shard(self, number: int) -> Shard:
        """Write a group's shard, unless it exists."""
        record = self.records / f"{number}.json"
        if record.exists():
            shard = Shard(*json.loads(record.read_bytes()), existed=True)
            file = FileInfo(**shard.entry["raw_data"]) if shard.entry else None
            path = Path(self.out) / file.basename if file else record
            # A store keeps what it has accepted.
            is_whole = self.is_remote or file is None or (path.exists() and find_fault(path, file) is None)
            if is_whole and (self.skip_unreadable or not shard.skipped):
                return shard
        with self.published(f"shard.{number:05}.mds") as path:
            shard = self._write([self.source.files[i] for i in self.groups[number]], path)
        write_atomically(record, json.dumps([shard.entry, shard.skipped]))
        return shard

    def _write(self, files: list[ImageFile], path: Path) -> Shard:
        columns = {"image": "bytes"} if files[0].label is None else {"image": "bytes", "label": "int"}
        writer = MDSWriter(columns=columns, out=str(path.parent / "mds"), hashes=HASHES, size_limit=None)
        skipped: list[str] = []
        for file in files:
            try:
                writer.write({"image": self._read_image(file), "label": file.label})
            except UnreadableImageError as error:
                if not self.skip_unreadable:
                    raise InputError(f"{error}; --skip-unreadable skips such images") from error
                skipped.append(str(error).removeprefix(f"{self.source.root}/"))
        entry = None
        if writer.new_samples:  # not finish(), which writes an index: an unfinished data set has none
            writer.flush_shard()
            entry = writer.shards[0]
            (path.parent / "mds" / entry["raw_data"]["basename"]).rename(path)
            entry["raw_data"]["basename"] = path.name
        writer.executor.shutdown()
        return Shard(entry, skipped)

    def _read_image(self, file: ImageFile) -> bytes:
        if self.source.pixels is not None:
            buffer = io.BytesIO()
            Image.fromarray(self.source.pixels[int(file.path)].permute(1, 2, 0).numpy()).save(buffer, "PNG")
            return buffer.getvalue()
        path = self.source.root / file.path
        with reading(path):
            return as_rgb_jpeg(read_image_file(path), str(path), *self.encoding)

    def finish(self, workers: int) -> list[Shard]:
        """Finish all shards in worker processes; return them in their order."""
        shards: list[Shard] = []
        left = if_interrupted(lambda: "finished shards are kept, the same command resumes")
        bar = progress_bar(total=len(self.source.files), desc="converting", unit="images")
        try:
            with ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (self,)) as pool, left, bar:
                for group, shard in zip(self.groups, pool.map(_finish_shard, range(len(self.groups))), strict=True):
                    shards.append(shard)
                    bar.update(len(group))
        except BrokenProcessPool as error:
            hint = "the same command resumes, with fewer workers if memory is short"
            raise RunError(f"--workers {workers}: a worker was killed; {hint}") from error
        return shards


_tasks: list[Task] = []  # a worker's own


def _start_worker(task: Task) -> None:
    die_with_parent()
    _tasks.append(task)


def _finish_shard(number: int) -> Shard:
    return _tasks[-1].finish_shard(number)


def work_folder(out: str) -> Path:
    """Return the local folder of an unfinished conversion to a folder or an object store."""
    if is_remote(out):
        return cache_folder() / "conversions" / hashlib.sha256(out.encode()).hexdigest()[:16]
    return Path(out).resolve() / ".converting"


class Conversion(NamedTuple):
    """The result of a conversion."""

    images: int
    classes: int | None
    """``None`` if the images have no labels."""
    bytes: int
    """The size of all shards."""
    shards: int
    skipped: list[str]
    """The reason for each unreadable image."""
    resumed: int
    """The shards that an interrupted run had finished."""


def convert_images(
    source: ImageSource,
    out: str | Path,
    encoding: Encoding,
    *,
    seed: int = 0,
    workers: int = 1,
    shard_bytes: int = 1 << 26,
    skip_unreadable: bool = False,
) -> Conversion:
    """Write images to an MDS data set with the columns ``image`` (a file's bytes) and, if known, ``label``.

    Args:
        source: The images; see :func:`find_images`. CIFAR-10's become PNGs, in their order.
        out: A folder, or an address in any store that mosaicml-streaming can write: s3://, gs://, …
        encoding: How to store the images of a folder.
        seed: The seed of the order.
        workers: Processes that convert.
        shard_bytes: The approximate size of a shard.
        skip_unreadable: Skip and list unreadable images instead of stopping.

    Raises:
        InputError: An image is unreadable, or ``out`` cannot be written or holds a data set.
        RunError: The disk or the store fails, or a worker was killed.
    """
    out = str(out).rstrip("/")
    work = work_folder(out)
    if source.pixels is None and work.is_relative_to(source.root.resolve()):
        raise InputError(f"{out}: is in the folder of the images, {source.root}")
    groups = _groups(source, encoding, seed, shard_bytes)
    described = repr((source.root.resolve(), encoding, source.files, [group.tolist() for group in groups]))
    records = work / hashlib.sha256(described.encode()).hexdigest()[:16]
    task = Task(source, encoding, skip_unreadable, out, is_remote(out), work, groups, records)
    task.check()
    with sole_user(work / "lock", LOCK_SECONDS) as alone:
        if not alone:
            raise InputError(f"{out}: another conversion is writing there")
        task.check()  # again: that conversion may have finished
        shards = task.finish(workers)
        entries = [shard.entry for shard in shards if shard.entry is not None]
        if not entries:
            raise InputError(f"{out}: none of the {len(source.files)} images can be read")
        names = {entry["raw_data"]["basename"] for entry in entries}
        for path in () if task.is_remote else Path(out).glob("shard.*.mds"):
            if path.name not in names:  # of an interrupted conversion with other settings
                path.unlink()
        skipped = [line for shard in shards for line in shard.skipped]
        num_images = sum(entry["samples"] for entry in entries)
        summary = {"images": num_images, "classes": source.classes, "skipped": skipped, "seed": seed}
        task.publish_json(SUMMARY, summary | encoding._asdict())
        task.publish_json(INDEX, {"version": 2, "shards": entries})
        shutil.rmtree(work)
    return Conversion(
        images=num_images,
        classes=len(source.classes) if source.classes else None,
        bytes=sum(entry["raw_data"]["bytes"] for entry in entries),
        shards=len(entries),
        skipped=skipped,
        resumed=sum(shard.existed for shard in shards),
    )


def _groups(source: ImageSource, encoding: Encoding, seed: int, shard_bytes: int) -> list[NDArray[np.int64]]:
    """Return the numbers of the images of each shard of about ``shard_bytes``, in a random order."""
    sizes = np.array([file.num_bytes for file in source.files])
    if encoding.resize:
        sizes = np.minimum(sizes, encoding.resize**2 * BYTES_PER_SQUARE)
    order = np.arange(len(sizes))
    if source.pixels is None:
        order = np.random.default_rng(seed).permutation(order)
    shards = sizes[order].cumsum() // shard_bytes
    return np.split(order, np.flatnonzero(np.diff(shards)) + 1)


def convert_cifar10(images: Path, out: Path, num_train: int = 50_000, num_test: int = 10_000) -> None:
    """Write the first images of each split of CIFAR-10 to ``out``/train and ``out``/test, unless they exist.

    Args:
        images: The folder of torchvision's CIFAR-10, which is downloaded to it if it is missing.
        out: A folder.
        num_train: Number of training images.
        num_test: Number of test images.

    Raises:
        InputError: CIFAR-10 cannot be downloaded or is corrupt, or ``out`` cannot be written.
    """
    for split, num_images in (("train", num_train), ("test", num_test)):
        if not (out / split / INDEX).exists():
            source = find_images(f"{CIFAR10}{images}", split)
            source = source._replace(files=source.files[:num_images])
            convert_images(source, out / split, Encoding(), workers=os.cpu_count() or 1)
