"""Open samples wherever they are: in a folder, MDS, Parquet files or WebDataset tars; local, in a store, on the hub."""

import json
import os
import re
import tarfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from glob import glob
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from d2v_composer.data.mds import INDEX, Index, is_mds
from d2v_composer.data.modality import Modality
from d2v_composer.data.shards import fetch_index
from d2v_composer.data.source import (
    Source,
    hash_of,
    list_folder,
    load_file,
    map_in_workers,
    mark_of,
    name_counts,
    number_labels,
    open_folder,
    open_mds,
)
from d2v_composer.system import fetch
from d2v_composer.system.errors import InputError, UnreadableSampleError, reading
from d2v_composer.system.part import ALL, Part
from d2v_composer.system.progress import progress_bar

# A folder that has both is img2dataset's, whose samples are in the tars.
SUFFIXES = (TAR := ".tar", ".parquet")
SPLITS = ("train", "val", "validation", "test")
CHOOSE = "choose one with --column, or column in a YAML"
# Types of Parquet columns that can hold samples: bytes, or the hub's struct of bytes and path; or paths.
BYTES, PATH = r"(?:large_)?binary|struct<.*\bbytes: (?:large_)?binary.*>", "(?:large_)?string"
# A tar's member: key and suffixes.
MEMBER = re.compile(r"(?:\./)?((?:.*/)?[^./]+)\.([^/]+)")
# The branch of a data set on the hub to which its bot converts all others.
CONVERTED = "refs/convert/parquet"


class _Listed(NamedTuple):
    """Samples of one file, with the fields of :class:`Source`."""

    ids: NDArray[Any]
    sizes: NDArray[np.int64]
    marks: NDArray[np.int64]
    load: Callable[[int], bytes]
    labels: list[Any]
    class_names: Sequence[str] = ()
    left_out: Mapping[str, int] = {}


@dataclass(frozen=True)
class Files:
    """Parquet files, or tars.

    Attributes:
        root: Folder or address.
        paths: Sorted paths in it.
        left_out: Number of other files by kind.
        modality: What the samples are.
        column: See :func:`open_source`.
        label_column: Likewise.
        part: What to open: some of the files if there are enough, or else all, of whose samples it is a part.
    """

    root: str
    paths: list[str]
    left_out: Mapping[str, int]
    modality: Modality
    column: str | None
    label_column: str | None
    part: Part = ALL

    def of_split(self, split: str) -> list[str]:
        """Return the paths that have a split's name as a word."""
        return [path for path in self.paths if re.search(rf"(?<![a-z]){split}(?![a-z])", path.lower())]

    def open_split(self, split: str | None) -> Source:
        """Open the samples of a split. The default is ``train``, or all if no file has that name; ``none`` means all.

        Names of classes are those of ``train``, if there is one.

        Raises:
            InputError: As :meth:`open`, or no file is called so.
        """
        chosen, train = self.paths if split == "none" else self.of_split(split or "train"), self.of_split("train")
        if not chosen and split is not None:
            known = ", ".join(filter(self.of_split, SPLITS)) or "none; omit --split"
            raise InputError(f"{self.root}: no split {split!r}; available: {known}")
        chosen = chosen or self.paths
        others = Counter(self.left_out) + Counter({"of other splits": len(self.paths) - len(chosen)})
        return replace(self, paths=chosen, left_out=others).open(
            lambda: replace(self, paths=train, part=ALL).open().class_names if train not in ([], chosen) else ()
        )

    def open(self, class_names: Callable[[], Sequence[str]] = tuple) -> Source:
        """Open all samples, file by file, in each file's order; remote files are fetched first.

        Args:
            class_names: Returns the names of classes, if the labels are names; empty: those that occur.

        Raises:
            InputError: A file cannot be read, a column is missing or ambiguous, or there are no samples.
        """
        _row_group.cache_clear()  # a file may have changed
        of_files = 1 < self.part.total <= len(self.paths)
        paths = self.part.of(self.paths) if of_files else self.paths
        read = self._read_tar if paths[0].lower().endswith(TAR) else self._read_parquet
        listed = map_in_workers(read, paths, min(len(paths) - 1, os.cpu_count() or 1))
        parts: list[_Listed] = [*progress_bar(listed, total=len(paths), desc="listing", unit="files")]
        left_out = dict(sorted(sum((Counter(part.left_out) for part in parts), Counter(self.left_out)).items()))
        ends = np.cumsum([len(part.ids) for part in parts]).tolist()
        if not (ends[-1] or of_files):
            found = f"in {len(parts)} files; other files: {name_counts(left_out)}"
            raise InputError(f"{self.root}: no {self.modality.unit} {found}")

        def load(number: int) -> bytes:
            part = bisect_right(ends, number)
            return parts[part].load(number - ends[part] + len(parts[part].sizes))

        is_remote, root = fetch.is_remote(self.root), Path(self.root)
        place = self.root if is_remote else [(root / path).stat().st_size for path in self.paths]
        source = Source(
            root=self.root,
            modality=self.modality,
            ids=np.concatenate([part.ids for part in parts]),
            load=load,
            sizes=np.concatenate([part.sizes for part in parts]),
            marks=np.concatenate([part.marks for part in parts]),
            content=hash_of(place, self.paths, self.column, None if of_files else ends),
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

    def _read_tar(self, path: str) -> _Listed:
        """List a tar's samples: adjacent members whose names are equal up to the first dot.

        Raises:
            InputError: The tar is damaged, a sample has several images or no label, or two have one key.
        """
        name, local = f"{self.root}/{path}", fetch.fetch(f"{self.root}/{path}")
        left_out, keys, offsets, sizes, labels = Counter[str](), list[str](), array("q"), array("q"), list[Any]()
        labeled, _, key_of_label = (self.label_column or "").partition(":")
        with reading(name), local.open("rb") as file:
            for key, group in groupby(_members(file), lambda member: member[0] and member[0][1]):
                members = [*group]
                fields = {match[2]: place for match, *place in members if match}
                suited = [field for field in fields if f".{field}".lower().endswith(self.modality.suffixes)]
                images = [field for field in suited if field == (self.column or field)]
                left_out.update(f".{field}" for field in fields if field not in (*images, labeled))
                if key is None or not images:
                    left_out[f"keys without {self.modality.unit}"] += key is not None
                    left_out["members without a key"] += len(members) - len(fields)
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
        if (statistics := local.with_name(f"{local.stem}_stats.json")).exists():  # img2dataset's
            with reading(statistics):
                counts = json.loads(statistics.read_bytes())
                left_out["failed downloads"] += counts["count"] - counts["successes"]
        load = partial(_load_member, name, local, np.array(offsets), np.array(sizes))
        ids, marks = np.array([f"{path}/{key}" for key in keys], str), _marks(local, path, self.column, len(keys))
        return _Listed(ids, np.array(sizes), marks, load, labels, left_out=+left_out)

    def _read_parquet(self, path: str) -> _Listed:
        """List a Parquet file's rows.

        Raises:
            InputError: The file is damaged, or a column is missing, of another type, or ambiguous.
        """
        import pyarrow.parquet

        name, local, label = f"{self.root}/{path}", fetch.fetch(f"{self.root}/{path}"), self.label_column
        with reading(name), pyarrow.parquet.ParquetFile(local) as file:
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
            ids = np.array([f"{path}#{row}" for row in range(metadata.num_rows)], str)
            marks = _marks(local, path, self.column, len(ids))
            if known[0] in of_bytes:
                groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
                rows = [group.num_rows for group in groups]
                means = [group.total_byte_size // max(group.num_rows, 1) for group in groups]
                sizes = np.repeat(np.array(means, np.int64), rows)
                load = partial(_load_row, name, local, known[0], np.cumsum([0, *rows]).tolist())
            elif fetch.is_remote(self.root):
                raise InputError(f"{name}: column {known[0]!r} holds paths, which are allowed only in a local file")
            else:
                paths = np.array([each or "" for each in file.read(known)[0].to_pylist()], str)
                places = [local.parent / each for each in paths]
                status = [each.stat() if each.is_file() else None for each in places]
                sizes = np.array([each.st_size if each else 0 for each in status])
                marks = marks + [mark_of(each and (each.st_size, each.st_mtime_ns)) for each in status]
                load = partial(load_file, local.parent, paths)
        return _Listed(ids, sizes, marks, load, labels, class_names)


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
    elif not is_local_mds:
        if column or label_column:
            raise InputError(f"{source}: a folder of {modality.unit} has no columns; omit --column")
        return replace(open_folder(Path(source), modality), part=part)
    index = Index(cache or Path(source), modality, column, labels=label_column, option="--column", remote=remote)
    return replace(open_mds(index, cache_limit), part=part)


def find_files(
    source: str, modality: Modality, column: str | None = None, label_column: str | None = None
) -> Files | None:
    """List the Parquet files or tars of a source.

    Args:
        source: A file, a folder or a glob; local, in a store of :data:`~d2v_composer.system.addresses.STORES`, or
            hf://datasets/ORG/NAME[@REVISION][/FOLDER]; in other stores a file.
        modality: What the samples are.
        column: See :func:`open_source`.
        label_column: Likewise.

    Returns:
        The files; ``None`` for a folder that may be another kind of source: it has none, or files of the modality too;
        remote: it has an MDS index, or cannot be listed.

    Raises:
        InputError: There are none, or the store cannot be listed.
    """
    is_remote, left_out = fetch.is_remote(source), {}
    head, star, _ = source.partition("*")
    root, pattern = source.rstrip("/"), ""
    if star or (source.lower().endswith(SUFFIXES) and not os.path.isdir(source)):
        root = os.path.dirname(head)
        pattern, root = source.removeprefix(root).lstrip("/"), root or "."
    if pattern and not star:
        found = [pattern]
    elif is_remote and not source.startswith(fetch.LISTED):
        return None
    elif is_remote:
        root, found = fetch.list_folder(root)
        matches = re.escape(pattern or "**/*").replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        found = [path for path in found if re.fullmatch(matches, path)]
    elif pattern:
        found = sorted(glob(pattern, root_dir=root, recursive=True))
    elif any(name.lower().endswith(modality.suffixes) for _, _, names in os.walk(root) for name in names):
        return None
    else:
        listed, left_out = list_folder(Path(root), SUFFIXES) if os.path.isdir(root) else ([], {})
        found = [path for path, *_ in listed]
    kinds = [PurePosixPath(path).suffix.lower() for path in found]
    kind = next((suffix for suffix in SUFFIXES if suffix in kinds), None)
    if kind is None and (on_hub := fetch.HUB.fullmatch(source)) and not on_hub[3] and not on_hub[4]:
        return find_files(f"{source}@{CONVERTED}", modality, column, label_column)
    if kind is None and (is_remote or star) and INDEX not in found:
        raise InputError(f"{source}: no Parquet files or tars")
    left_out = Counter(left_out) + Counter(each or "without suffix" for each in kinds if each != kind)
    paths = [path for path, each in zip(found, kinds, strict=True) if each == kind]
    return None if kind is None else Files(root, paths, left_out, modality, column, label_column)


def _marks(local: Path, path: str, column: str | None, count: int) -> NDArray[np.int64]:
    status = local.stat()
    return mark_of(path, column, status.st_size, status.st_mtime_ns) + np.arange(count)


def _members(file: BinaryIO) -> Iterator[tuple[re.Match[str] | None, int, int]]:
    """Yield each file in a tar: key and suffixes (``None`` if it belongs to no sample), offset and size.

    Raises:
        ValueError: The tar ends too early. tarfile's errors if it is damaged.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            cast("Any", tar).members.clear()  # it would keep all
            if not member.isdir():
                yield MEMBER.fullmatch(member.name) if member.isreg() else None, member.offset_data, member.size
    file.seek(-1024, os.SEEK_END)
    if any(file.read()):  # tarfile misses a cut between two members
        raise ValueError("it is truncated")


def _load_member(name: str, local: Path, offsets: NDArray[np.int64], sizes: NDArray[np.int64], number: int) -> bytes:
    with reading(name), local.open("rb") as file:
        file.seek(offsets[number])
        return file.read(sizes[number])


def _load_row(name: str, local: Path, column: str, starts: list[int], row: int) -> bytes:
    group = bisect_right(starts, row) - 1
    with reading(f"{name}, row group {group}"):
        value = _row_group(local, column, group)[row - starts[group]].as_py()
    value = value["bytes"] if isinstance(value, dict) else value
    if value is None:
        raise UnreadableSampleError(f"{name}#{row} is null")
    return value


@lru_cache(maxsize=1)
def _row_group(local: Path, column: str, group: int) -> Any:
    """Read a row group's samples; each process caches its last one."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(local, page_checksum_verification=True) as file:
        return file.read_row_group(group, [column], use_threads=False)[0]
