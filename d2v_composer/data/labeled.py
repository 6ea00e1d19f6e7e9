"""Load labeled samples into memory, for retrieval and the tests of fine-tuning, and make batches of them."""

import hashlib
import json
import logging
import os
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader
from xxhash import xxh3_128_digest

from d2v_composer.data.images import Images
from d2v_composer.data.index import SUMMARY, read_index
from d2v_composer.data.modality import (
    Modality,
    SampleFile,
    Transform,
    collate,
    list_classes,
    list_files,
    list_subfolders,
    name_counts,
    read_sample_file,
    sample_rng,
)
from d2v_composer.data.shards import Shards
from d2v_composer.models.sizes import ImageSize
from d2v_composer.system.errors import InputError, RunError, reading, reason
from d2v_composer.system.fetch import fetch
from d2v_composer.system.processes import die_with_parent

Format = Literal["cifar10", "cifar100", "folder", "mds", "speech_commands"]
CIFAR = ("cifar10", "cifar100")
# What a format holds, if not any modality.
HOLDS = {**dict.fromkeys(CIFAR, "image"), "speech_commands": "audio"}
SPEECH_COMMANDS = "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
TEST_LIST, VALIDATION_LIST = "testing_list.txt", "validation_list.txt"

log = logging.getLogger(__name__)


def evenly_spaced(total: int, most: int | None) -> Sequence[int]:
    """Return at most ``most`` of the numbers below ``total``, evenly spaced; ``None``: all."""
    if most is None or most >= total:
        return range(total)
    return [number * total // most for number in range(most)]


class LabeledSamples(NamedTuple):
    """Samples with one label each; without labels, all are 0."""

    samples: Any
    """Images, (N, 3, height, width) uint8; or N clips, (L,) float32 each."""
    labels: Tensor
    """(N,) int64."""


class LabeledSet(NamedTuple):
    """Two splits, each the bank for the other's queries; or only test images, without labels (all 0)."""

    train: LabeledSamples
    test: LabeledSamples
    class_names: tuple[str, ...] = ()
    """Name of each label; empty if the labels are only numbers."""

    def numbered(self) -> "LabeledSet":
        """Renumber the labels from 0 without gaps, and keep their names, because tables have a row for each label."""
        if not self.has_labels:
            return self
        found, numbers = torch.cat([self.train.labels, self.test.labels]).unique(return_inverse=True)
        known = dict(enumerate(self.class_names))
        train, test = numbers.split(self.num_samples)
        return LabeledSet(
            self.train._replace(labels=train),
            self.test._replace(labels=test),
            tuple(known.get(label, str(label)) for label in found.tolist()),
        )

    def fingerprint(self) -> str:
        """Return a hash of the labels, to identify the set. Pixels are left out: they vary with the decoder.

        Without labels it is by the mean pixel, a whole number, and by the length of clips.
        """
        labels = [split.labels.tolist() for split in (self.train, self.test)]
        if not self.has_labels:
            sizes, sums = ([getattr(each, kind)() for each in self.test.samples] for kind in ("numel", "sum"))
            labels.append([round(float(sum(sums)) / sum(sizes)), *(sizes if len({*sizes}) > 1 else ())])
        return hashlib.sha256(json.dumps(labels).encode()).hexdigest()

    def count_shared(self) -> int:
        """Return the number of test images that are, bit by bit, among the train images."""
        train, test = ([xxh3_128_digest(each.contiguous().numpy()) for each in samples] for samples, _ in self[:2])
        return sum(map({*train}.__contains__, test))

    @classmethod
    def without_labels(cls, samples: LabeledSamples) -> "LabeledSet":
        """Return a set of samples without labels."""
        return cls(LabeledSamples(samples.samples[:0], samples.labels[:0]), samples)

    @property
    def has_labels(self) -> bool:
        """True unless there are only test images, without labels."""
        return len(self.train.labels) > 0

    @property
    def num_samples(self) -> tuple[int, int]:
        """Number of images in train and test."""
        return len(self.train.labels), len(self.test.labels)


def load_labeled_set(
    format: Format,
    root: str | Path,
    modality: Modality | None = None,
    *,
    image_size: ImageSize = 224,
    interpolation: str = "bicubic",
    download: bool = False,
    column: str | None = None,
    label_column: str | None = "label",
    max_images: int | None = None,
) -> LabeledSet:
    """Load a labeled set, or a set without labels: a folder without class folders, or MDS without ``label_column``.

    Args:
        format: ``cifar10`` or ``cifar100``: torchvision's files in ``root``; ``folder``: root/train/CLASS/… and
            root/test/CLASS/…; ``mds``: root/train and root/test; ``speech_commands``: what
            its archive unpacks to. Without labels only root/test is read, or the whole root if it has neither split.
        root: The folder.
        modality: What the samples are; default: images.
        image_size: Images of a folder or of MDS are resized to this many pixels a side. CIFAR keeps its size: it is
            resized in batches on the device.
        interpolation: How they are resized: bicubic or bilinear, as the model's config says.
        download: Fetch CIFAR or Speech Commands if it is missing.
        column: The column of an MDS data set that holds the samples; default: the modality's name.
        label_column: The column of an MDS data set that holds the labels; ``None``: it has no labels.
        max_images: Load at most this many images of each split, evenly spaced; the others of a folder or of MDS are not
            even read.

    Raises:
        InputError: The set is missing or corrupt, has no images or another modality's; or those chosen are all of one
            class.
    """
    root, modality = Path(root), modality or Images(image_size, interpolation)
    if (held := HOLDS.get(format, modality.name)) != modality.name:
        raise InputError(f"{root}: {format} has samples of the modality {held}, and the model takes {modality.unit}")
    options = modality, column, label_column, max_images
    splits = root / "train", root / "test"
    alone = splits[1] if any(split.is_dir() for split in splits) else root  # the images of a set without labels
    if format in CIFAR:
        labeled = _load_cifar(format, root, download, max_images)
    elif format == "speech_commands":
        labeled = _load_speech_commands(root, modality, download, max_images)
    elif format == "folder" and alone.is_dir() and not any(map(list_subfolders, filter(Path.is_dir, splits))):
        if alone == root and list_subfolders(root):
            log.warning("%s: has no labels, which are in train/CLASS and test/CLASS: its folders are no classes", root)
        labeled = LabeledSet.without_labels(_load_folder(alone, modality, max_images))
    elif format == "folder":
        labeled = _load_folders(root, modality, max_images)
    elif label_column is None:
        labeled = LabeledSet.without_labels(load_mds(alone, *options))
    else:
        train, test = (load_mds(split, *options) for split in splits)
        labeled = LabeledSet(train, test, read_class_names(root))
    for split in (labeled.train, labeled.test) if labeled.has_labels else ():
        # Labels may recur at the very spacing of the images chosen, and then all are hits.
        if 1 < len(split.labels) == max_images and bool((split.labels == split.labels[0]).all()):
            raise InputError(f"{root}: max_images={max_images} selects only one class; choose another value")
    return labeled


def _load_cifar(format: Format, root: Path, download: bool, max_images: int | None) -> LabeledSet:
    from torchvision.datasets import CIFAR10, CIFAR100  # takes a second

    dataset_class = CIFAR10 if format == "cifar10" else CIFAR100
    try:
        if download:
            root.mkdir(parents=True, exist_ok=True)
        # Several runs and machines may share the folder.
        with FileLock(root / ".download.lock") if download else nullcontext():
            splits = [dataset_class(str(root), train=train, download=download) for train in (True, False)]
    except Exception as error:
        hint = f"{'' if download else 'set download: true to fetch it, or '}unpack {dataset_class.url} in {root}"
        raise InputError(f"{root}: no readable {dataset_class.__name__} ({reason(error)}); {hint}") from error
    chosen = [evenly_spaced(len(split), max_images) for split in splits]
    train, test = (
        LabeledSamples(torch.from_numpy(split.data[those]).permute(0, 3, 1, 2), torch.tensor(split.targets)[those])
        for split, those in zip(splits, chosen, strict=True)
    )
    return LabeledSet(train, test, tuple(splits[0].classes))


def _load_speech_commands(root: Path, modality: Modality, download: bool, max_images: int | None) -> LabeledSet:
    """Load Speech Commands v2 (Warden 2018, arXiv:1804.03209): one-second clips of 35 words.

    Test is what its testing_list.txt names, train what neither that nor its validation_list.txt names; the validation
    clips and the background noise are not used.
    """
    with reading(root):
        if download:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / ".download.lock"):
                if not (root / TEST_LIST).exists():
                    with tarfile.open(fetch(SPEECH_COMMANDS)) as tar:
                        # The list comes last: it says that all clips are there.
                        tar.extractall(root, sorted(tar, key=lambda member: TEST_LIST in member.name), filter="data")
        elif not (root / TEST_LIST).exists():
            raise InputError(f"{root}: no {TEST_LIST}; set download: true, or unpack {SPEECH_COMMANDS} there")
        paths = sorted(root.glob("[a-z]*/*.wav"))  # not _background_noise_/…
        test, validation = (
            {root / path for path in (root / name).read_text().split()} for name in (TEST_LIST, VALIDATION_LIST)
        )
    splits = [path for path in paths if path not in test | validation], [path for path in paths if path in test]
    if not all(splits):
        raise InputError(f"{root}: expected clips of {TEST_LIST} and others, WORD/*.wav; got {len(paths)} clips")
    names = sorted({path.parent.name for path in paths})
    chosen = [[split[i] for i in evenly_spaced(len(split), max_images)] for split in splits]
    files = ([(path, names.index(path.parent.name)) for path in split] for split in chosen)
    train, held_out = (_read_files(split, modality) for split in files)
    return LabeledSet(train, held_out, tuple(names))


def _load_folder(folder: Path, modality: Modality, max_images: int | None) -> LabeledSamples:
    """Load a folder's samples without labels."""
    files = _list_aloud(folder, modality)
    chosen = [folder / files[i].path for i in evenly_spaced(len(files), max_images)]
    return _read_files([(path, 0) for path in chosen], modality)


def _list_aloud(folder: Path, modality: Modality, in_classes: bool = False) -> list[SampleFile]:
    """List files, or those in class folders, and say what is left out."""
    files, others = list_files(folder, modality)
    chosen = [file for file in files if "/" in file.path or not in_classes]
    if num_beside := len(files) - len(chosen):
        others[f"{modality.unit} beside the class folders"] = num_beside
    if others:
        log.warning("%s: left out: %s", folder, name_counts(others))
    return chosen


def _load_folders(root: Path, modality: Modality, max_images: int | None) -> LabeledSet:
    file = f"CLASS/*{modality.suffixes[0]}"
    layout = f"expected {root}/train/{file} and {root}/test/{file}, with the same classes"
    splits: list[LabeledSamples] = []
    class_names: list[str] = []
    for folder in (root / "train", root / "test"):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder; {layout}")
        paths = [file.path for file in _list_aloud(folder, modality, in_classes=True)]
        if not paths:
            raise InputError(f"{folder}: no {modality.unit} in its class folders; {layout}")
        class_names = class_names or list_classes(folder, modality)
        names = [path.split("/", 1)[0] for path in paths]
        if unknown := sorted(set(names) - set(class_names)):
            raise InputError(f"{folder / unknown[0]}: this class is not in the train folder; {layout}")
        chosen = [(folder / paths[i], class_names.index(names[i])) for i in evenly_spaced(len(paths), max_images)]
        splits.append(_read_files(chosen, modality))
    return LabeledSet(splits[0], splits[1], tuple(class_names))


def _read_files(files: list[tuple[Path, int]], modality: Modality) -> LabeledSamples:
    samples = modality.stack((modality.decode(read_sample_file(path), str(path)) for path, _ in files), len(files))
    return LabeledSamples(samples, torch.tensor([label for _, label in files], dtype=torch.int64))


def load_mds(
    folder: Path,
    modality: Modality,
    column: str | None,
    label_column: str | None,
    max_images: int | None = None,
) -> LabeledSamples:
    """Load one split of an MDS data set (see :func:`load_labeled_set`); shards that are not needed are not read."""
    column, others = column or modality.name, () if label_column is None else (label_column,)
    read_index(folder, column, modality, option="column and label_column", other_columns=others)
    shards = Shards(local=folder, columns=(column, *others))
    chosen = evenly_spaced(len(shards), max_images)
    labels = torch.zeros(len(chosen), dtype=torch.int64)

    def decoded() -> Iterator[Tensor]:
        for i, number in enumerate(chosen):
            sample, source = shards[number], f"sample {number} of {folder}"
            if label_column is not None:
                labels[i] = whole_label(sample[label_column], source)
            yield modality.decode(sample[column], source)

    return LabeledSamples(modality.stack(decoded(), len(chosen)), labels)


def whole_label(value: Any, source: str) -> int:
    """Return a label as a whole number.

    Raises:
        InputError: It is no whole number.
    """
    with suppress(TypeError, ValueError, OverflowError):
        if (label := int(value)) == float(value):
            return label
    raise InputError(f"{source}: its label must be a whole number, got {value!r:.40}")


def read_class_names(root: Path) -> tuple[str, ...]:
    """Return the class names that d2v convert-images wrote next to the index in ROOT/train or ROOT/test, if any.

    Raises:
        InputError: The two differ, so that a label means another class in test than in train.
    """
    found = set()
    for path in (root / split / SUMMARY for split in ("train", "test")):
        if path.exists():
            with reading(path):
                found.add(tuple(json.loads(path.read_bytes())["classes"] or ()))
    names, *others = sorted(found - {()}) or [()]
    if others:
        raise InputError(f"{root}: train and test name their classes differently; convert both from one SOURCE")
    return names


class Augmentation(NamedTuple):
    """A reproducible augmentation of samples in memory."""

    transform: Transform
    seed: int

    def __call__(self, sample: Tensor, *place: int) -> Tensor:
        """Augment a sample with random numbers that depend only on the seed and two whole numbers."""
        return self.transform(sample, sample_rng(self.seed, *place))


def collate_labeled(pairs: Sequence[tuple[Tensor, Any]]) -> list[Tensor]:
    """Return a batch of samples with labels: inputs, labels and, if some are padded, what :func:`collate` adds."""
    samples, labels = zip(*pairs, strict=True)
    values, *others = collate(samples)
    return [values, torch.tensor([int(label) for label in labels]), *others]


def worker_options(num_workers: int, prefetch_factor: int, for_gpu: bool, timeout: float = 0) -> dict[str, Any]:
    """Return DataLoader arguments for workers that prepare batches in advance; with 0, this process prepares them.

    So it does on Windows, which cannot fork, and on macOS, where a process with threads must not.
    """
    options = {"pin_memory": for_gpu}  # which creates a CUDA context
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
    function: Callable[[Any], Any], items: Sequence[Any], workers: int, for_gpu: bool = False
) -> Iterator[Any]:
    """Yield a function's result for each item, in order, computed ahead by worker processes.

    Raises:
        RunError: A worker was killed.
        Exception: The function's; other than ours, with the worker's traceback as its text.
    """

    def call(item: Any) -> tuple[Any, Exception | None]:
        try:
            return function(item), None
        except (InputError, RunError) as problem:
            return None, problem

    options = worker_options(workers, 2, for_gpu)
    try:
        # Without a name, it ends with the loop: an error that torch raises would hold it, and its workers the lock.
        for result, problem in DataLoader(items, batch_size=None, collate_fn=call, **options):  # pyright: ignore[reportArgumentType]: items have a length
            if problem is not None:
                raise problem
            yield result
    except (OSError, RuntimeError) as error:
        cause = str(error).strip().splitlines()[-1]
        if isinstance(error, RuntimeError) and not cause.startswith("DataLoader worker (pid"):
            raise
        raise RunError(f"reading failed ({cause}): the same command resumes") from error


def eval_batches(labeled: LabeledSamples, batch_size: int) -> DataLoader:
    """Return the loader for this rank's share of all samples, not augmented; Composer drops the last ranks' padding."""
    from composer.utils import dist

    dataset: Any = list(zip(*labeled, strict=True))
    options = {"sampler": dist.get_sampler(dataset), "pin_memory": torch.cuda.is_available()}
    return DataLoader(dataset, batch_size, collate_fn=collate_labeled, **options)
