"""Load labeled samples into memory, and make batches of them."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from xxhash import xxh3_128_digest

from d2v_composer.data.images import Images
from d2v_composer.data.modality import Modality, collate
from d2v_composer.models.configs import ImageSize
from d2v_composer.models.provenance import Json
from d2v_composer.sources.mds import SUMMARY, Index, Summary, is_mds
from d2v_composer.sources.open import NONE, SPLITS, find_files, open_source
from d2v_composer.sources.source import Columns, Source, map_in_threads, name_counts, open_mds
from d2v_composer.system.errors import InputError, reading, reason
from d2v_composer.system.files import read_json

# Format → the only modality that it holds.
HOLDS = {"cifar10": "image", "cifar100": "image", "speech_commands": "audio"}
SIDE = 32  # pixels per side of CIFAR's images
SPEECH_COMMANDS = "https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz"
TEST_LIST, VALIDATION_LIST = "testing_list.txt", "validation_list.txt"

log = logging.getLogger(__name__)


def evenly_spaced(total: int, maximum: int | None) -> Sequence[int]:
    """Return at most ``maximum`` evenly spaced whole numbers from 0 to ``total`` - 1; ``None``: return all."""
    if maximum is None or maximum >= total:
        return range(total)
    return [number * total // maximum for number in range(maximum)]


class LabeledSamples(NamedTuple):
    """Samples and their labels. In a set without labels, each sample has the label 0."""

    samples: Any
    """Images, (N, 3, height, width) uint8; or a list of N clips at 16 kHz, each (L,) float32."""
    labels: Tensor
    """Label of each sample, (N,) int64."""


class EvaluationSet(NamedTuple):
    """The splits train and test of a data set; without labels, ``train`` has no samples."""

    train: LabeledSamples
    test: LabeledSamples
    class_names: tuple[str, ...] = ()
    """Name of each label; empty if the names are unknown."""
    class_embeddings: Tensor | None = None
    """Embeddings of the C class names by a text tower, (C, P) float32."""

    def numbered(self) -> "EvaluationSet":
        """Renumber the labels from 0 without gaps, with class names and embeddings to match; return the new set."""
        if not self.has_labels:
            return self
        values, numbers = torch.cat([self.train.labels, self.test.labels]).unique(return_inverse=True)
        names = dict(enumerate(self.class_names))
        train, test = numbers.split(self.num_samples)
        rows, labels = self.class_embeddings, values.tolist()
        if rows is not None:  # those of classes without images come last, as wrong answers
            rows = rows[sorted(range(len(rows)), key=lambda label: label not in labels)]
        return EvaluationSet(
            self.train._replace(labels=train),
            self.test._replace(labels=test),
            tuple(names.get(label, str(label)) for label in labels),
            rows,
        )

    def fingerprint(self) -> str:
        """Return a hash that identifies the set: of the labels or, without labels, of statistics of the samples."""
        # Pixels are not hashed, because they vary with the decoder.
        labels = [split.labels.tolist() for split in (self.train, self.test)]
        if not self.has_labels:
            sizes, sums = ([getattr(sample, kind)() for sample in self.test.samples] for kind in ("numel", "sum"))
            labels.append([round(float(sum(sums)) / sum(sizes)), *(sizes if len({*sizes}) > 1 else ())])
        return hashlib.sha256(json.dumps(labels).encode()).hexdigest()

    def count_shared(self) -> int:
        """Return the number of test samples whose decoded values equal those of a train sample."""
        train, test = ([xxh3_128_digest(sample.contiguous().numpy()) for sample in samples] for samples, _ in self[:2])
        return sum(map({*train}.__contains__, test))

    @classmethod
    def without_labels(cls, samples: LabeledSamples) -> "EvaluationSet":
        """Return a set that has only test samples, without labels."""
        return cls(LabeledSamples(samples.samples[:0], samples.labels[:0]), samples)

    @property
    def has_labels(self) -> bool:
        return len(self.train.labels) > 0

    @property
    def num_samples(self) -> tuple[int, int]:
        """Numbers of samples in train and in test."""
        return len(self.train.labels), len(self.test.labels)


def load_labeled_set(
    format: str | None,
    root: str | Path,
    modality: Modality | None = None,
    *,
    image_size: ImageSize = 224,
    interpolation: str = "bicubic",
    download: bool = False,
    column: str | None = None,
    label_column: str | None = "label",
    max_images: int | None = None,
    class_embeddings: str | Path | None = None,
) -> EvaluationSet:
    """Load the splits train and test of a labeled set, or only the test samples of a set without labels.

    Args:
        format: One of :data:`~d2v_composer.sources.FORMATS`; ``None``: infer the format from the files in ``root``,
            which is not possible for CIFAR and Speech Commands.
        root: For CIFAR, the folder of torchvision's files; for Speech Commands, the folder of its unpacked archive; for
            MDS, the folder that contains the data sets train and test (without labels, it may be a data set itself);
            for other formats, a source of :func:`~d2v_composer.sources.open.open_source`.
        modality: Modality of the samples; default: images, resized to ``image_size``.
        image_size: Pixels per side, or (height, width). CIFAR's images are not resized.
        interpolation: Interpolation with which images are resized: ``bicubic`` or ``bilinear``.
        download: Download CIFAR, if missing, to ``root``.
        column: The column that holds the samples; see :func:`~d2v_composer.sources.open.open_source`.
        label_column: The column that holds the labels; ``None``: no labels. Ignored for CIFAR and Speech Commands.
        max_images: Maximum number of samples of each split, which are evenly spaced; default: all.
        class_embeddings: A .npy file, (C, P), with a text tower's embedding of each class, in the order of the labels.

    Raises:
        InputError: The set cannot be read, or does not fit an argument.

    Example:
        >>> cifar10 = load_labeled_set("mds", "cifar10", image_size=32, max_images=100)
        >>> cifar10.test.samples.shape, cifar10.test.labels.shape
        (torch.Size([100, 3, 32, 32]), torch.Size([100]))
    """
    modality = modality or Images(image_size, interpolation)
    if (held := HOLDS.get(format or "", modality.name)) != modality.name:
        raise InputError(f"{root}: {format} has {held} samples, but {modality.unit} are expected")
    if format in ("cifar10", "cifar100"):
        sources = [*open_cifar(format, Path(root), download).values()]
    elif format == "speech_commands":
        sources = _open_speech_commands(Path(root), modality)
    else:
        sources = _open_splits(str(root), modality, format, column, label_column)
    for root, left_out in {(source.root, name_counts(source.left_out)) for source in sources if source.left_out}:
        log.warning("%s: left out %s", root, left_out)
    splits = [_load(source, max_images) for source in sources]
    labeled = EvaluationSet.without_labels(splits[0])
    if splits[1:]:
        labeled = EvaluationSet(splits[0], splits[1], sources[0].class_names)
    for split in (labeled.train, labeled.test) if labeled.has_labels else ():
        # Labels may recur at the very spacing of the images chosen, and then all are hits.
        if 1 < len(split.labels) == max_images and bool((split.labels == split.labels[0]).all()):
            raise InputError(f"{root}: max_images={max_images} selects samples of only one class; choose another value")
    if class_embeddings is not None and labeled.has_labels:
        labeled = labeled._replace(class_embeddings=_read_class_embeddings(Path(class_embeddings), labeled))
    return labeled


def open_labeled_sets(
    section: Mapping[str, Json], modality: Modality, **changes: Json
) -> dict[str, Callable[[], EvaluationSet]]:
    """Return name of a data set → function that loads the data set with its labels renumbered."""

    def load(options: Mapping[str, Json]) -> EvaluationSet:
        return load_labeled_set(
            modality=modality, **{"max_images": section.get("max_images"), **options, **changes}
        ).numbered()

    return {name: partial(load, options) for name, options in section["datasets"].items() if options is not None}


ONLY_SAMPLES = {"download": False, "class_embeddings": None}
"""Arguments with which :func:`open_labeled_sets` neither downloads data sets nor reads class embeddings."""


def _read_class_embeddings(path: Path, labeled: EvaluationSet) -> Tensor:
    """Read the embeddings of the set's C classes, (C, P) float32."""
    with reading(path):
        rows = torch.from_numpy(np.load(path)).float()
    # Labels without names may be of more classes than these samples.
    num_labels = max(int(split.labels.max()) + 1 for split in labeled[:2])
    num_classes = len(labeled.class_names) or max(num_labels, len(rows))
    if rows.ndim != 2 or len(rows) != num_classes:
        shape = tuple(rows.shape)
        raise InputError(f"{path}: expected an array with one row for each of {num_classes} classes, got shape {shape}")
    if not rows.isfinite().all():
        raise InputError(f"{path}: some of its numbers are infinite or NaN")
    return rows


def open_cifar(name: str, root: Path, download: bool) -> dict[str, Source]:
    """Open the splits ``train`` and ``test`` of torchvision's ``cifar10`` or ``cifar100``."""
    from torchvision.datasets import CIFAR10, CIFAR100  # takes a second

    dataset_class = CIFAR10 if name == "cifar10" else CIFAR100
    try:
        if download:
            root.mkdir(parents=True, exist_ok=True)
        # Several runs and machines may share the folder.
        with FileLock(root / ".download.lock") if download else nullcontext():
            splits = {
                split: dataset_class(str(root), train=split == "train", download=download)
                for split in ("train", "test")
            }
    except Exception as error:
        raise InputError(
            f"{root}: no readable {dataset_class.__name__} ({reason(error)}); "
            f"{'' if download else 'set download: true to fetch it, or '}unpack {dataset_class.url} in {root}"
        ) from error
    return {
        split: Source(
            root=f"{name}:{root}/{split}",
            modality=Images(SIDE),
            ids=np.arange(len(dataset)),
            load=lambda number, dataset=dataset: Image.fromarray(dataset.data[number]),
            label=lambda number, dataset=dataset: dataset.targets[number],
            class_names=tuple(dataset.classes),
            sizes=np.full(len(dataset), 3 * SIDE**2),
            fingerprints=np.arange(len(dataset)),
            content=split,
        )
        for split, dataset in splits.items()
    }


def _open_splits(
    root: str, modality: Modality, format: str | None, column: str | None, label_column: str | None
) -> list[Source]:
    """Open the splits train and test or, without labels, only the test samples."""
    whole, *folders = (Path(root, name) for name in ("", "train", "test"))
    if format == "mds" or (format is None and any(map(is_mds, (whole, *folders)))):
        if label_column is None:
            alone = folders[1] if any(map(Path.is_dir, folders)) else whole
            return [open_mds(Index(alone, modality, column))]
        class_names = read_class_names(whole)
        indices = [Index(folder, modality, column, labels=label_column) for folder in folders]
        return [replace(open_mds(index), class_names=class_names) for index in indices]
    kind = "" if format == "folder" else format and f".{format}"
    files = find_files(root, modality, column, label_column, split=None, kind=kind)
    if files is None:
        raise InputError(
            f"{root}: expected a local folder or, in a store, Parquet files, tars or zips; MDS must be local"
        )
    unlabeled = replace(files, columns=Columns(modality, column if files.has_columns else None))
    if not files.has_columns or (label_column == "label" and unlabeled.in_folders):  # "label" is the default
        files = unlabeled
    splits = files.find_splits(*SPLITS)
    test = next(filter(splits.__contains__, ("test", "validation", "val")), None)
    if label_column is None or (files.in_folders and "train" not in splits):
        if label_column and test is None and any("/" in path for path in splits[""].values()):
            log.warning("%s: found no labels; to add labels, sort the files into train/CLASS and test/CLASS", root)
        return [files.open_split(test or NONE, NONE)]
    sources = [files.open_split(split) for split in ("train", test or "test")]
    if (sources[0].label is None) != (sources[1].label is None):
        raise InputError(f"{root}: expected class folders in train and in {test}, or in neither")
    return sources[sources[0].label is None :]


def _open_speech_commands(root: Path, modality: Modality) -> list[Source]:
    """Open the splits train and test of Speech Commands v2 (Warden 2018, arXiv:1804.03209)."""
    with reading(root):
        if not (root / TEST_LIST).exists():
            raise InputError(f"{root}: no {TEST_LIST}; unpack {SPEECH_COMMANDS} in this folder")
        test, validation = ((root / name).read_text().split() for name in (TEST_LIST, VALIDATION_LIST))
    source = open_source(str(root), modality)
    clips = source.select([number for number, path in enumerate(source.ids) if "/" in path and path[0] != "_"])
    words = [path.split("/")[0] for path in clips.ids]
    clips = clips.with_classes(words, sorted({*words}), "")
    is_test, is_used = np.isin([*clips.ids], test), ~np.isin([*clips.ids], test + validation)
    splits = [clips.select(np.flatnonzero(mask)) for mask in (is_used, is_test)]
    if not all(map(len, splits)):
        raise InputError(
            f"{root}: expected clips WORD/*.wav for training, and clips named in {TEST_LIST} for the test; "
            f"found {len(splits[0])} for training and {len(splits[1])} for the test"
        )
    return splits


def _load(source: Source, max_images: int | None) -> LabeledSamples:
    numbers = evenly_spaced(len(source), max_images)
    labels = [0 if source.label is None else source.label(number) for number in numbers]
    samples = source.modality.stack(map_in_threads(source.decode, numbers), len(numbers))
    return LabeledSamples(samples, torch.tensor(labels, dtype=torch.int64))


def load_mds(folder: Path, modality: Modality, column: str | None, label_column: str | None) -> LabeledSamples:
    """Load all samples of an MDS data set; for the columns, see :func:`load_labeled_set`."""
    return _load(open_mds(Index(folder, modality, column, labels=label_column)), None)


def read_class_names(root: Path) -> tuple[str, ...]:
    """Return the class names that a conversion recorded in ROOT/train and ROOT/test; empty if it recorded none."""
    variants = set()
    for path in (root / split / SUMMARY for split in ("train", "test")):
        if path.exists():
            variants.add(tuple(read_json(path, Summary).get("classes") or ()))
    names, *conflicts = sorted(variants - {()}) or [()]
    if conflicts:
        raise InputError(f"{root}: train and test name their classes differently; convert both from the same SOURCE")
    return names


def collate_labeled(pairs: Sequence[tuple[Tensor, int | Tensor]]) -> list[Tensor]:
    """Return a batch: the inputs; the labels, (B,) int64; and, if inputs are padded, their lengths, (B,) int64."""
    samples, labels = zip(*pairs, strict=True)
    values, *lengths = collate(samples)
    return [values, torch.tensor([int(label) for label in labels]), *lengths]


def eval_batches(labeled: LabeledSamples, batch_size: int) -> DataLoader:
    """Return a loader of this rank's share of the samples."""
    from composer.utils import dist

    dataset: Any = list(zip(*labeled, strict=True))
    # The sampler repeats samples until all ranks have equally many; Composer leaves the repetitions out of metrics.
    options = {"sampler": dist.get_sampler(dataset), "pin_memory": torch.cuda.is_available()}
    return DataLoader(dataset, batch_size, collate_fn=collate_labeled, **options)
