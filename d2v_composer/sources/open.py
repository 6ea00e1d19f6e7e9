"""Open the samples of a source: a folder, an MDS data set, or files that hold many samples."""

import csv
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain, takewhile
from os.path import splitext
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import Any

import numpy as np

from d2v_composer.data.modality import Modality
from d2v_composer.models.provenance import Json
from d2v_composer.sources import CONTAINERS, NAMES, Container, listed, path_of
from d2v_composer.sources.listing import FileSnapshot, list_files
from d2v_composer.sources.mds import INDEX, Index, is_mds
from d2v_composer.sources.shards import fetch_index
from d2v_composer.sources.source import (
    Columns,
    PackedStrings,
    SampleListing,
    Source,
    hash_of,
    list_folder,
    map_in_workers,
    name_counts,
    open_mds,
    whole_label,
)
from d2v_composer.system import fetch
from d2v_composer.system.errors import InputError, reading
from d2v_composer.system.fetch import File
from d2v_composer.system.processes import ALL, Part
from d2v_composer.system.progress import progress_bar

SPLITS, NONE = ("train", "val", "validation", "test"), "none"
TAR, TABLE = ".tar", ".parquet"
KAGGLE_LABELS = re.compile(r"LOC_\w+_solution\.csv")


@dataclass(frozen=True)
class Files:
    """The files of a source, all of one kind: samples in a folder, or files that hold many samples.

    Attributes:
        root: Folder or address to which the files' paths are relative.
        files: The files.
        left_out: Kind of files that are left out → their number.
        is_chosen: True if the source is a file or a glob, and not a folder.
        container: Kind of the files; ``None`` for samples in a folder.
        columns: The columns to read.
        part: The part of the source that a command processes.
    """

    root: str
    files: list[File]
    left_out: Mapping[str, int]
    is_chosen: bool
    container: Container | None
    columns: Columns
    part: Part = ALL

    @property
    def has_columns(self) -> bool:
        """True if the files are of a kind that has columns."""
        return self.container is not None and self.container.labels != ""

    @cached_property
    def in_folders(self) -> bool:
        """True if folders, or folders in archives, are splits and classes. The first tar decides for all tars."""
        return not self.has_columns or (self.has_paths and self._have_folders(self._list(self.files[0]).labels))

    @property
    def has_paths(self) -> bool:
        """True if samples are listed with their paths, and not with labels from a column."""
        if self.container is None or not self.has_columns:
            return True
        return self.container.suffix == TAR and self.columns.labels is None

    def _have_folders(self, labels: Sequence[Json]) -> bool:
        return not self.has_columns or (self.has_paths and any("/" in path for path in labels))

    def find_splits(self, *names: str) -> dict[str, Any]:  # two forms, which in_folders tells apart
        """Find the splits with these names.

        Returns:
            If :attr:`in_folders` is true, the result of :func:`sort_folders`; otherwise, split → its files.
        """
        if self.in_folders:
            return sort_folders(self._opened[1], *names)
        splits = dict[str, list[File]]()
        for file in self.files:
            words = split_words(file.path, names)
            if len(words.intersection(SPLITS)) > 1:
                raise InputError(
                    f"{self.root}/{file.path}: the path does not tell whether the split is {listed(sorted(words))}; "
                    "rename the file or, if the command has --split, choose files with a glob and --split none"
                )
            for word in words:
                splits.setdefault(word, []).append(file)
        return splits

    def open(self) -> Source:
        """Open all samples."""
        return self._opened[0]

    def open_split(self, split: str | None, labels: str | Path | None = None) -> Source:
        """Open the samples of a split."""
        if self.has_paths and split == labels == NONE:
            return self.open()
        split = split and split.lower()
        whole, name = replace(self, part=ALL), split or "train"
        splits = whole.find_splits(*(() if split == NONE else (*SPLITS, name)))
        # Without --split, the one split of a file or a glob that the user chose is meant.
        available = [word for word in SPLITS if word in splits]
        if name not in splits and split != NONE and (split or len(available) > int(self.is_chosen)):
            found = f"available: {', '.join(available)}" if available else "the source has no splits"
            raise InputError(f"{self.root}: no split {name!r}; {found}")
        if whole.in_folders:
            source = whole._open_folders(splits if name in splits else whole.find_splits(), split, labels)
            return replace(source, part=self.part)
        chosen, train = splits.get(name, self.files), splits.get("train")
        left_out = Counter(self.left_out) + Counter({"of other splits": len(self.files) - len(chosen)})
        files = replace(self, files=chosen, left_out=left_out)
        source, file_labels, names = files._opened
        if self.columns.labels is None:
            return source
        if not all(isinstance(label, str) for label in file_labels):
            return replace(
                source,
                label=lambda number: whole_label(file_labels[number], source.name(number)),
                class_names=tuple(names),
            )
        has_all_classes = train in (None, chosen) and source.part == self.part
        class_names = () if has_all_classes else replace(whole, files=train or chosen).open_split(NONE).class_names
        class_names = class_names or sorted({*file_labels})
        return source.with_classes(file_labels, class_names, "each class must be in the train split")

    def _open_folders(self, splits: dict[str, dict[int, str]], split: str | None, labels: str | Path | None) -> Source:
        """Open the samples of a split or, if ``splits`` lacks the split, all samples."""
        name = split or "train"
        chosen = splits[name if name in splits else ""]
        has_classes = any("/" in path for path in chosen.values())
        beside = {path.partition("/")[0] for path in splits.get("", {}).values() if "/" in path}
        if split is None and name in splits and beside and not has_classes:
            others = shorten(", ".join(sorted(beside)), 80, placeholder=" …")
            raise InputError(
                f"{self.root}: the folder train may be a split, or a class like {others}; choose with --split train or "
                "--split none"
            )
        source = self.open().select([*chosen])
        hint = (
            "each class needs a folder in train; to ignore classes, use --labels none or, in a YAML, label_column: null"
        )
        if labels is None and not has_classes:
            labels = file if (file := Path(self.root, f"LOC_{name}_solution.csv")).is_file() else NONE
        if labels == NONE:
            return source
        of_train = splits.get("train", chosen)
        class_names = sorted({path.partition("/")[0] for path in of_train.values() if "/" in path})
        names = [path.partition("/")[0] for path in chosen.values()]
        if labels is not None:
            with reading(labels), open(labels, encoding="utf-8-sig", newline="") as file:
                rows = [row for row in csv.reader(file) if len(row) > 1]
            end = " " if KAGGLE_LABELS.fullmatch(Path(labels).name) else "\n"  # in Kaggle's, boxes follow the class
            classes = dict[str, str]()
            for path, name in ((path_of(row[0]), row[1].strip().partition(end)[0]) for row in rows):
                if classes.setdefault(path, name) != name:
                    raise InputError(f"{labels}: {path} has two classes, {classes[path]} and {name}")

            def class_of(number: int, path: str) -> str:
                known = (classes.get(name) for whole in (path, all_ids[number]) for name in (whole, splitext(whole)[0]))
                return next(filter(None, known), "")

            all_ids = self.open().ids
            names = [*map(class_of, chosen, chosen.values())]
            class_names = sorted({*map(class_of, of_train, of_train.values())} - {""}) or class_names
            hint = f"{labels} must have a line 'sample,class' for each sample"
        return source.with_classes(names, class_names, hint)

    @cached_property
    def _opened(self) -> tuple[Source, Sequence[Json], Sequence[str]]:
        """Open all samples, file by file.

        Returns:
            The samples; their labels as stored or, with :attr:`has_paths`, their paths; and the class names that the
            first file states.
        """
        modality, columns = self.columns.modality, self.columns
        given = {"--column": columns.samples, "--label-column": columns.labels}
        if not self.has_columns and (needless := [option for option, column in given.items() if column]):
            raise InputError(f"{self.root}: samples in folders or zips have no columns; omit {' and '.join(needless)}")
        of_files = self.container is not None and 1 < self.part.total <= len(self.files)
        files = self.part.of(self.files) if of_files else self.files
        if self.container is None:
            parts = [list_folder(Path(self.root), files)]
        else:
            opened = map_in_workers(self._list, files, min(len(files) - 1, os.cpu_count() or 1))
            parts = [*progress_bar(opened, total=len(files), desc="listing", unit="files")]
        left_out = sum((Counter(part.left_out) for part in parts), Counter(self.left_out))
        ends = np.cumsum([len(part.ids) for part in parts]).tolist()
        if not (ends[-1] or of_files):
            where = (
                f"; files searched: {len(files)}" if self.container else f"; supported: {', '.join(modality.suffixes)}"
            )
            raise InputError(f"{self.root}: no {modality.unit}{where}; other files: {name_counts(left_out)}")
        if len({tuple(part.class_names) for part in parts}) > 1 and columns.labels:
            raise InputError(f"{self.root}: its files have different class names for the column {columns.labels!r}")

        def load(number: int) -> bytes:
            part = bisect_right(ends, number)
            return parts[part].load(number - ends[part] + len(parts[part].sizes))

        listed_labels = chain.from_iterable(part.labels for part in parts)
        labels: Sequence[Json] = PackedStrings(listed_labels) if self.has_paths else [*listed_labels]
        source = Source(
            root=self.root,
            modality=modality,
            ids=PackedStrings(chain.from_iterable(part.ids for part in parts)),
            load=load,
            sizes=np.concatenate([part.sizes for part in parts]),
            fingerprints=np.concatenate([part.fingerprints for part in parts]),
            content=hash_of(
                fetch.is_remote(self.root) and self.root,
                [file[:3] for file in self.files],
                columns.samples,
                of_files or [part.content for part in parts],
            ),
            left_out=dict(sorted(left_out.items())),
            in_folders=self._have_folders(labels),
            part=ALL if of_files else self.part,
        )
        return source, labels, parts[0].class_names

    def _list(self, file: File) -> SampleListing:
        assert self.container is not None
        snapshot = FileSnapshot.of(self.root, file)
        samples: SampleListing = snapshot.read(partial(self.container.list_samples, snapshot, columns=self.columns))
        if self._have_folders(samples.labels) and len(words := split_words(file.path, SPLITS)) == 1:  # a zip of a split
            folder = f"{words.pop()}/"
            paths = [path if f"/{folder}" in f"/{path.lower()}" else folder + path for path in samples.labels]
            samples = samples._replace(labels=paths)
        return samples


def sort_folders(paths: Sequence[str], *splits: str) -> dict[str, dict[int, str]]:
    """Group samples by split.

    Take the deepest folder that contains all samples, but is neither a split nor in a split. Its subfolders with names
    in ``splits`` are the splits.

    Returns:
        Split → index of a sample → path in the split's folder; the key '' is for the samples outside of splits.
    """
    common = takewhile(lambda folder: folder.lower() not in splits, os.path.commonprefix([*paths]).split("/")[:-1])  # noqa: RUF071
    start = sum(len(folder) + 1 for folder in common)
    folders = dict[str, dict[int, str]]()
    for number, path in enumerate(paths):
        top, _, rest = path[start:].partition("/")
        is_split = rest != "" and top.lower() in splits
        folders.setdefault(top.lower() if is_split else "", {})[number] = rest if is_split else path[start:]
    return folders


def open_source(
    source: str,
    modality: Modality,
    *,
    split: str | None = NONE,
    labels: str | Path | None = NONE,
    column: str | None = None,
    label_column: str | None = None,
    cache: Path | None = None,
    cache_limit: int | None = None,
    part: Part = ALL,
) -> Source:
    """Open the samples of a folder, an MDS data set, or files that hold many samples."""
    files = None
    if not (cache or is_mds(Path(source))):
        files = find_files(source, modality, column, label_column, split=split)
    if labels not in (None, NONE) and not (files and files.in_folders):
        raise InputError(f"--labels: applies only to samples in folders; for {source}, use --label-column")
    if files is not None:
        return replace(files, part=part).open_split(split, labels)
    if cache is not None and not fetch.is_remote(source):
        raise InputError(f"--local: must be left out, because {source} is not in a store")
    if fetch.is_remote(source) and cache is None:
        raise InputError(
            f"{source}: expected {NAMES}, or MDS in a local folder; d2v embed also reads MDS in a store, with --local"
        )
    if cache is not None:
        fetch_index(source, cache)
    folder, remote = cache or Path(source), source if cache else None
    index = Index(folder, modality, column, labels=label_column, remote=remote)
    return replace(open_mds(index, cache_limit), part=part)


def find_files(
    source: str,
    modality: Modality,
    column: str | None = None,
    label_column: str | None = None,
    *,
    split: str | None = NONE,
    kind: str | None = None,
) -> Files | None:
    """List the files of a source, all of one kind: samples in a local folder, or files that hold many samples.

    If every Parquet file has the name of a tar, apart from the suffix, the Parquet files are left out.

    Returns:
        The files; ``None`` for an MDS data set in a store, or for an address whose files cannot be listed.
    """
    is_remote = fetch.is_remote(source)
    kinds = {container.suffix: container for container in CONTAINERS if kind in (None, container.suffix)}
    samples = () if is_remote or kind else modality.suffixes
    if (listing := list_files(source, (*samples, *kinds), modality.needs)) is None:
        return None
    by_kind = dict[str, list[File]]()
    for file in listing.files:
        suffix = PurePosixPath(file.path).suffix.lower()
        by_kind.setdefault(suffix if suffix in kinds else "", []).append(file)
    folder = f"/{split or 'train'}/".lower()
    inside = [suffix for suffix, files in by_kind.items() if any(folder in f"/{file.path.lower()}" for file in files)]
    tars, tables = ({file.path.removesuffix(end) for file in by_kind.get(end, ())} for end in (TAR, TABLE))
    suffixes = inside if inside and split != NONE else by_kind
    # A file that the user names is listed, whatever it is.
    chosen = [suffix for suffix in suffixes if kind in (None, suffix) and not (suffix == TABLE and tables <= tars)]
    if len(chosen) > 1:
        plurals = [(files, kinds[suffix].plural if suffix else modality.unit) for suffix, files in by_kind.items()]
        counts = " and ".join(f"{plural} ({len(files)})" for files, plural in plurals)
        globs = " or ".join(f"'{listing.root}/**/*{PurePosixPath(files[0].path).suffix}'" for files, _ in plurals)
        raise InputError(f"{source} holds {counts}; choose one kind with a glob: {globs}")
    if not chosen and (is_remote or kind or "*" in source):
        is_store = not ("*" in source or source.startswith("hf://"))
        if is_store and fetch.exists(f"{listing.root}/{INDEX}"):
            return None
        raise InputError(
            f"{source}: no {listed(container.plural for container in kinds.values())}"
            f"{f', nor {modality.unit}' if samples else ''}"
        )
    kind = next(iter(chosen), "")
    skipped = {ending or modality.unit: len(files) for ending, files in by_kind.items() if ending != kind}
    left_out, columns = {**listing.left_out, **skipped}, Columns(modality, column, label_column)
    return Files(listing.root, by_kind.get(kind, []), left_out, listing.is_chosen, kinds.get(kind), columns)


def split_words(path: str, splits: Iterable[str]) -> set[str]:
    """Return the splits that are words of a file's name; without any, those that are words of its folders' names."""
    folders, _, name = path.lower().rpartition("/")
    in_name, in_folders = (
        {split for split in splits if re.search(rf"(?<![a-z]){re.escape(split.lower())}(?![a-z])", text)}
        for text in (name, folders)
    )
    return in_name or in_folders
