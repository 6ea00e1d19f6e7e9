"""Open samples wherever they are: in a folder, MDS, Parquet files or WebDataset tars; local, in a store, on the hub."""

import json
import os
import re
import tarfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from d2v_composer.data.listing import Pinned, list_files
from d2v_composer.data.mds import INDEX, Index, is_mds
from d2v_composer.data.modality import Modality
from d2v_composer.data.shards import fetch_index
from d2v_composer.data.source import (
    Names,
    Source,
    hash_of,
    load_file,
    map_in_workers,
    mark_of,
    name_counts,
    number_labels,
    open_folder,
    open_mds,
)
from d2v_composer.system import fetch
from d2v_composer.system.errors import InputError, UnreadableSampleError
from d2v_composer.system.fetch import File
from d2v_composer.system.part import ALL, Part
from d2v_composer.system.progress import progress_bar

TAR, PARQUET = ".tar", ".parquet"
CONTAINERS = {TAR: "tars", PARQUET: "Parquet files"}
SPLITS, NONE = ("train", "val", "validation", "test"), "none"
CHOOSE = "choose one with --column, or column in a YAML"
# Types of Parquet columns that can hold samples: bytes, or the hub's struct of bytes and path; or paths.
BYTES, PATH = r"(?:large_)?binary|struct<([^<>]*, )?bytes: (?:large_)?binary\b.*>", "(?:large_)?string"
# A tar's member: key and suffixes.
MEMBER = re.compile(r"(?:\./)?((?:.*/)?[^./]+)\.([^/]+)")
# After a tar's last member come two blocks of zeros, and more that fill a record.
LEAST_ZEROS, MOST_ZEROS = 1024, 1 << 16


class _Listed(NamedTuple):
    """Samples of one file, with the fields of :class:`Source`."""

    file: File
    ids: Names
    sizes: NDArray[np.int64]
    marks: NDArray[np.int64]
    load: Callable[[int], bytes]
    labels: list[Any]
    class_names: Sequence[str] = ()
    left_out: Mapping[str, int] = {}


@dataclass(frozen=True)
class Files:
    """Files of one kind that hold samples, or are samples.

    Attributes:
        root: A folder or an address.
        files: Files in it.
        left_out: Number of other files by kind.
        is_chosen: The user named a file or a glob.
        kind: The files' suffix; empty: they are samples in a folder.
        modality: What the samples are.
        column: See :func:`open_source`.
        label_column: Likewise.
        part: What to open: some of the files if there are enough, or else all, of whose samples it is a part.
    """

    root: str
    files: list[File]
    left_out: Mapping[str, int]
    is_chosen: bool
    kind: str
    modality: Modality
    column: str | None
    label_column: str | None
    part: Part = ALL

    def of_split(self, split: str) -> list[File]:
        """Return the files of a split: its name is a word of the file's name, or else of its folders' names.

        Raises:
            InputError: A file may be of two splits.
        """
        chosen = []
        for file in self.files:
            folders, _, name = file.path.lower().rpartition("/")
            words = _splits_in(name, split) or _splits_in(folders, split)
            if len(words.intersection(SPLITS)) > 1:
                either = " or ".join(sorted(words))
                raise InputError(f"{self.root}/{file.path}: is it of {either}? Choose files by a glob")
            chosen += [file] if split.lower() in words else []
        return chosen

    def open_split(self, split: str | None) -> Source:
        """Open the samples of a split; ``none`` means all. The default is ``train``, or all if no file names a split.

        Names of classes are those of ``train``, if there is one.

        Raises:
            InputError: As :meth:`open`, or no file is of this split.
        """
        chosen, train = ([] if split == NONE else self.of_split(each or "train") for each in (split, None))
        if not chosen and split != NONE:
            known = [*filter(self.of_split, SPLITS)]
            if split or len(known) > self.is_chosen:  # a user who names a test file means it
                available = ", ".join(known) or "none; omit --split"
                raise InputError(f"{self.root}: no split {split or 'train'!r}; available: {available}")
        chosen = chosen or self.files
        others = Counter(self.left_out) + Counter({"of other splits": len(self.files) - len(chosen)})
        return replace(self, files=chosen, left_out=others).open(
            lambda: replace(self, files=train, part=ALL).open().class_names if train not in ([], chosen) else ()
        )

    def open(self, class_names: Callable[[], Sequence[str]] = tuple) -> Source:
        """Open all samples, file by file, in each file's order; remote files are fetched first.

        Args:
            class_names: Returns the names of classes, if the labels are names; empty: those that occur.

        Raises:
            InputError: A file cannot be read, a column is missing or ambiguous, or there are no samples.
        """
        if not self.kind:
            if self.column or self.label_column:
                raise InputError(f"{self.root}: a folder of {self.modality.unit} has no columns; omit --column")
            return replace(open_folder(Path(self.root), self.modality, self.files, self.left_out), part=self.part)
        of_files = 1 < self.part.total <= len(self.files)
        files = self.part.of(self.files) if of_files else self.files
        listed = map_in_workers(self._list, files, min(len(files) - 1, os.cpu_count() or 1))
        parts: list[_Listed] = [*progress_bar(listed, total=len(files), desc="listing", unit="files")]
        left_out = dict(sorted(sum((Counter(part.left_out) for part in parts), Counter(self.left_out)).items()))
        ends = np.cumsum([len(part.ids) for part in parts]).tolist()
        if not (ends[-1] or of_files):
            found = f"in {len(parts)} files; other files: {name_counts(left_out)}"
            raise InputError(f"{self.root}: no {self.modality.unit} {found}")

        def load(number: int) -> bytes:
            part = bisect_right(ends, number)
            return parts[part].load(number - ends[part] + len(parts[part].sizes))

        contents = self.files if of_files else [part.file for part in parts]
        source = Source(
            root=self.root,
            modality=self.modality,
            ids=Names(chain.from_iterable(part.ids for part in parts)),
            load=load,
            sizes=np.concatenate([part.sizes for part in parts]),
            marks=np.concatenate([part.marks for part in parts]),
            content=hash_of(fetch.is_remote(self.root) and self.root, [file[:3] for file in contents], self.column),
            left_out=left_out,
            part=ALL if of_files else self.part,
        )
        if self.label_column is None:
            return source
        labels, names = [label for part in parts for label in part.labels], {tuple(part.class_names) for part in parts}
        if len(names) > 1:
            raise InputError(f"{self.root}: its files name the classes of {self.label_column} differently")
        whole = replace(self, part=ALL)  # which has all names
        known = (lambda: class_names() or whole.open().class_names) if of_files else class_names
        return number_labels(source, labels, names.pop(), known)

    def _list(self, file: File) -> _Listed:
        """List the samples of a file.

        Raises:
            InputError: It is damaged, or its samples or labels are not what the user wants.
        """
        pinned = Pinned.of(self.root, file)
        return pinned.read(partial(self._list_tar if self.kind == TAR else self._list_parquet, pinned))

    def _marks(self, pinned: Pinned, count: int) -> NDArray[np.int64]:
        return mark_of(pinned.file, self.column) + np.arange(count)

    def _list_tar(self, pinned: Pinned, file: BinaryIO) -> _Listed:
        name = pinned.name
        left_out, keys, offsets, sizes, labels = Counter[str](), list[str](), array("q"), array("q"), list[Any]()
        labeled, _, key_of_label = (self.label_column or "").partition(":")
        for key, members in read_tar(file):
            fields = {suffix: place for suffix, *place in members}
            suited = [suffix for suffix in fields if f".{suffix}".lower().endswith(self.modality.suffixes)]
            images = [suffix for suffix in suited if suffix == (self.column or suffix)]
            if key is None:
                left_out["members without a key"] += len(members)
                continue
            left_out.update(f".{suffix}" for suffix, *_ in members if suffix not in (*images, labeled))
            if not images:
                left_out[f"keys without {self.modality.unit}"] += 1
                continue
            if len(images) > 1:
                raise InputError(f"{name}/{key} has {' and '.join(images)}; {CHOOSE}")
            if len(fields) < len(members):
                raise InputError(f"{name} has two members {key}.{images[0]}, or two others of {key} with one name")
            if labeled:
                if labeled not in fields:
                    raise InputError(f"{name}/{key} has no .{labeled} with its label; it has {', '.join(fields)}")
                file.seek(fields[labeled][0])
                label = file.read(fields[labeled][1]).decode().strip()
                label = json.loads(label).get(key_of_label) if key_of_label else label
                labels.append(int(label) if re.fullmatch(r"-?\d+", str(label)) else label)
            keys.append(key)
            offsets.append(fields[images[0]][0])
            sizes.append(fields[images[0]][1])
        if twice := next((key for key, count in Counter(keys).items() if count > 1), None):
            raise InputError(f"{name} has the key {twice!r} twice, with other samples between")
        if (statistics := pinned.path.with_name(f"{pinned.path.stem}_stats.json")).exists():  # img2dataset's
            with suppress(LookupError, TypeError, ValueError):  # another program's
                counts = json.loads(statistics.read_bytes())
                left_out["failed downloads"] += counts["count"] - counts["successes"]
        ids, marks = Names(f"{pinned.file.path}/{key}" for key in keys), self._marks(pinned, len(keys))
        load = partial(_load_member, pinned, np.array(offsets), np.array(sizes))
        return _Listed(pinned.file, ids, np.array(sizes), marks, load, labels, left_out=+left_out)

    def _list_parquet(self, pinned: Pinned, opened: BinaryIO) -> _Listed:
        import pyarrow.parquet

        name, path, folder, label = pinned.name, pinned.file.path, pinned.path.parent, self.label_column
        with pyarrow.parquet.ParquetFile(opened) as file:
            schema, metadata = file.schema_arrow, file.metadata
            types = {field.name: str(field.type) for field in schema}
            of_bytes, of_paths = ([each for each in types if re.fullmatch(kind, types[each])] for kind in (BYTES, PATH))
            fits = of_bytes or of_paths
            known = [each for each in of_bytes + of_paths if each == self.column] if self.column else fits
            if len(known) != 1:
                found = f"{self.column} is {types.get(self.column, 'missing')}" if self.column else f"{len(fits)} fit"
                listed = ", ".join(types if self.column else fits or types)
                wanted = f"expected one column of {self.modality.unit}, as bytes or paths"
                raise InputError(f"{name}: {wanted}; {found}: {listed}; {CHOOSE}")
            if label not in (None, *types):
                raise InputError(f"{name}: no column {label!r} of labels; the columns are {', '.join(types)}")
            labels = file.read([label])[0].to_pylist() if label else []
            hub = json.loads((schema.metadata or {}).get(b"huggingface", "{}")).get("info", {}).get("features", {})
            class_names = hub.get(label, {}).get("names", ())
            ids = Names(f"{path}#{row}" for row in range(metadata.num_rows))
            marks = self._marks(pinned, len(ids))
            if known[0] in of_bytes:
                groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
                rows = [group.num_rows for group in groups]
                means = [group.total_byte_size // max(group.num_rows, 1) for group in groups]
                sizes = np.repeat(np.array(means, np.int64), rows)
                load = partial(_load_row, pinned, known[0], np.cumsum([0, *rows]).tolist())
            elif fetch.is_remote(name):
                raise InputError(f"{name}: column {known[0]!r} holds paths, which are allowed only in a local file")
            else:
                paths = Names(each or "" for each in file.read(known)[0].to_pylist())
                places = [(each, folder / each) for each in paths]
                files = [File.of(each, place) if os.path.isfile(place) else None for each, place in places]
                sizes, own = np.array([each.size if each else 0 for each in files]), np.array([*map(mark_of, files)])
                marks, load = marks + own, partial(load_file, folder, paths, own)
        return _Listed(pinned.file, ids, sizes, marks, load, labels, class_names)


def open_source(
    source: str,
    modality: Modality,
    *,
    column: str | None = None,
    label_column: str | None = None,
    cache: Path | None = None,
    cache_limit: int | None = None,
    part: Part = ALL,
) -> Source:
    """Open the samples of a folder, an MDS data set, Parquet files or tars.

    Args:
        source: A folder with an MDS ``index.json``, or with ``cache`` an object store's address: an MDS data set, whose
            ids are the samples' numbers. What :func:`find_files` lists; the ids are FILE.parquet#ROW or FILE.tar/KEY.
            Another folder: the files in it and its subfolders, whose ids are their paths.
        modality: What the samples are.
        column: The column that holds the samples, in tars their suffix; default: in MDS the modality's name, else the
            only one.
        label_column: The column of labels, in tars ``cls`` or ``json:KEY``; default: no labels.
        cache: The folder for the shards of an MDS data set in a store.
        cache_limit: Maximum size of the cache, in bytes; default: no limit.
        part: Open the files of a part alone; if there are fewer files than parts, all, with the part noted.

    Raises:
        InputError: The source cannot be used.
    """
    remote, is_local_mds = source if fetch.is_remote(source) else None, is_mds(Path(source))
    if not (cache or is_local_mds) and (files := find_files(source, modality, column, label_column)) is not None:
        return replace(files, part=part).open()
    if (remote is None) != (cache is None):
        raise InputError(f"{source}: give --local with shards in an object store, and only then")
    if remote is not None and cache is not None:
        fetch_index(remote, cache)
    index = Index(cache or Path(source), modality, column, labels=label_column, option="--column", remote=remote)
    return replace(open_mds(index, cache_limit), part=part)


def find_files(
    source: str,
    modality: Modality,
    column: str | None = None,
    label_column: str | None = None,
    kinds: Sequence[str] = ("", *CONTAINERS),
) -> Files | None:
    """List the files of a source that are of one kind: Parquet files, tars or, in a folder here, samples.

    Parquet files beside tars of the same names are img2dataset's tables, and left out.

    Args:
        source: See :func:`~d2v_composer.data.listing.list_files`.
        modality: What the samples are.
        column: See :func:`open_source`.
        label_column: Likewise.
        kinds: Which to look for; empty: samples.

    Returns:
        The files; ``None`` for an address with an MDS index, or that cannot be listed.

    Raises:
        InputError: There are none in a store or of a glob, they are of several kinds, or they cannot be listed.
    """
    is_remote = fetch.is_remote(source)
    samples = () if is_remote or "" not in kinds else modality.suffixes
    if (listing := list_files(source, (*samples, *filter(None, kinds)), modality.needs)) is None:
        return None
    by_kind = dict[str, list[File]]()
    for file in listing.files:
        suffix = PurePosixPath(file.path).suffix.lower()
        by_kind.setdefault(suffix if suffix in CONTAINERS else "", []).append(file)
    stems = [{os.path.splitext(file.path)[0] for file in by_kind.get(kind, ())} for kind in (TAR, PARQUET)]
    tables = by_kind.pop(PARQUET) if stems[0] and stems[0] >= stems[1] > set() else []
    if len(by_kind) > 1:
        counts = " and ".join(f"{len(files)} {CONTAINERS.get(kind, modality.unit)}" for kind, files in by_kind.items())
        suffixes = [PurePosixPath(files[0].path).suffix for files in by_kind.values()]
        globs = " or ".join(f"'{listing.root}/**/*{suffix}'" for suffix in suffixes)
        raise InputError(f"{source} holds {counts}; choose the samples by a glob: {globs}")
    if not by_kind and (is_remote or "*" in source):
        is_store = not ("*" in source or source.startswith("hf://"))
        if is_store and fetch.exists(f"{listing.root}/{INDEX}"):
            return None
        raise InputError(f"{source}: no Parquet files or tars{f', nor {modality.unit}' if samples else ''}")
    kind, files = next(iter(by_kind.items()), ("", []))
    left_out = Counter(listing.left_out) + Counter({PARQUET: len(tables)})
    return Files(listing.root, files, left_out, listing.is_chosen, kind, modality, column, label_column)


def _splits_in(text: str, split: str) -> set[str]:
    """Return the words in a text that name a split."""
    words = (*SPLITS, split.lower())
    return {word for word in words if re.search(rf"(?<![a-z]){re.escape(word)}(?![a-z])", text)}


def read_tar(file: BinaryIO) -> Iterator[tuple[str | None, list[tuple[str, int, int]]]]:
    """Yield the samples of a tar: adjacent members whose names are equal up to the first dot.

    Yields:
        The key, ``None`` for members that belong to no sample; and suffix, offset and size of each member.

    Raises:
        ValueError: The tar is damaged, cut, or joined to another, or has a sparse member. tarfile's errors likewise.
    """
    key, members = None, list[tuple[str, int, int]]()
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            cast("Any", tar).members.clear()  # it would keep all
            if member.issparse():
                raise ValueError(f"its member {member.name} is sparse; pack it without tar's option -S")
            if member.isdir():
                continue
            name = MEMBER.fullmatch(member.name) if member.isreg() else None
            if members and (name and name[1]) != key:
                yield key, members
                members = []
            key = name and name[1]
            members.append((name[2] if name else "", member.offset_data, member.size))
        # tarfile takes a damaged header for the end, and misses a cut between two members.
        file.seek(tar.offset)
        rest = file.read(MOST_ZEROS + 1)
    if any(rest) or not LEAST_ZEROS <= len(rest) <= MOST_ZEROS:
        raise ValueError(f"at byte {tar.offset} is no member, nor its end: it is damaged, cut, or joined to another")
    if members:
        yield key, members


def _load_member(pinned: Pinned, offsets: NDArray[np.int64], sizes: NDArray[np.int64], number: int) -> bytes:
    def read(file: BinaryIO) -> bytes:
        file.seek(offsets[number])
        return file.read(sizes[number])

    return pinned.read(read)


def _load_row(pinned: Pinned, column: str, starts: list[int], row: int) -> bytes:
    group = bisect_right(starts, row) - 1
    value = _row_group(pinned, column, group)[row - starts[group]].as_py()
    value = value["bytes"] if isinstance(value, dict) else value
    if value is None:
        raise UnreadableSampleError(f"{pinned.name}#{row} is null")
    return value


@lru_cache(maxsize=1)
def _row_group(pinned: Pinned, column: str, group: int) -> Any:
    """Read a row group's samples; each process caches its last one."""
    import pyarrow.parquet

    def read(file: BinaryIO) -> Any:
        with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as opened:
            return opened.read_row_group(group, [column], use_threads=False)[0]

    return pinned.read(read, f", row group {group}")
