"""Open samples wherever they are: in a folder, MDS, Parquet files or WebDataset tars; local, in a store, on the hub."""

import json
import os
import re
import tarfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from glob import glob
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from d2v_composer.data.mds import INDEX, Index, is_mds
from d2v_composer.data.modality import MAX_BYTES, Modality, read_sample_file
from d2v_composer.data.shards import fetch_index
from d2v_composer.data.source import (
    Source,
    hash_of,
    list_folder,
    map_in_workers,
    mark_of,
    name_counts,
    number_labels,
    open_folder,
    open_mds,
)
from d2v_composer.system import fetch
from d2v_composer.system.errors import InputError, UnreadableSampleError, reading
from d2v_composer.system.progress import progress_bar
from d2v_composer.system.retry import is_missing

# A folder that has both is img2dataset's, whose samples are in the tars.
TAR, PARQUET = SUFFIXES = (".tar", ".parquet")
CHOOSE = "choose one with --column, or column in a YAML"
SPLITS = ("train", "val", "validation", "test")
# Types of Parquet columns that can hold samples: bytes, or the hub's struct of bytes and path; or paths.
BYTES, PATH = r"(?:large_)?binary|struct<.*\bbytes: (?:large_)?binary.*>", "(?:large_)?string"
# A tar's member: key and suffixes.
MEMBER = re.compile(r"(?:\./)?((?:.*/)?[^./]+)\.([^/]+)")
# The branch of a data set on the hub to which its bot converts all others.
CONVERTED = "refs/convert/parquet"


class Files(NamedTuple):
    """Parquet files, or tars."""

    root: str
    """Folder or address."""
    paths: list[str]
    """Sorted paths in it."""
    others: Mapping[str, int]
    """Number of files left out, by kind."""

    def of_split(self, split: str) -> list[str]:
        """Return the paths that have a split's name as a word."""
        return [path for path in self.paths if re.search(rf"(?<![a-z]){split}(?![a-z])", path.lower())]

    def select(self, split: str | None) -> "Files":
        """Return the files of a split; by default those of ``train``, or all if none is called so.

        Raises:
            InputError: There are none.
        """
        chosen = self.paths if split == "none" else self.of_split(split or "train")
        if not chosen and split is not None:
            known = ", ".join(filter(self.of_split, SPLITS)) or "none; omit --split"
            raise InputError(f"{self.root}: no split {split!r}; available: {known}")
        chosen = chosen or self.paths
        num_left = len(self.paths) - len(chosen)
        return self._replace(
            paths=chosen, others={**self.others, **({"of other splits": num_left} if num_left else {})}
        )


class _Part(NamedTuple):
    """The samples of a file."""

    ids: NDArray[Any]
    sizes: NDArray[np.int64]
    load: Callable[[int], bytes]
    others: Mapping[str, int]
    labels: list[Any]
    class_names: Sequence[str]
    marks: NDArray[np.int64]


def open_source(
    source: str,
    modality: Modality,
    *,
    column: str | None = None,
    label_column: str | None = None,
    cache: Path | None = None,
    cache_limit: int | None = None,
) -> Source:
    """Open the samples of a folder, an MDS data set, Parquet files or tars.

    Args:
        source: A folder with an MDS ``index.json`` or an object store's address: an MDS data set, whose ids are the
            samples' numbers. A Parquet file or a tar, a folder or a glob of these, local, in a store, or
            hf://datasets/…; the ids are FILE.parquet#ROW or FILE.tar/KEY. Another folder: the files in it and its
            subfolders, whose ids are their paths.
        modality: What the samples are.
        column: The column that holds the samples, in tars their suffix; default: in MDS the modality's name, else the
            only one.
        label_column: The column of labels, in tars ``cls`` or ``json:KEY``; default: no labels.
        cache: The folder for the shards of an MDS data set in a store.
        cache_limit: Maximum size of the cache, in bytes; default: no limit.

    Raises:
        InputError: The source cannot be used.
    """
    remote = source if fetch.is_remote(source) else None
    if remote is None and cache is not None:
        raise InputError(f"{source}: --local is needed for an object store's shards, and for nothing else")
    if is_mds(Path(source)) or (remote and cache and _has_index(remote, cache)):
        index = Index(cache or Path(source), modality, column, labels=label_column, option="--column", remote=remote)
        return open_mds(index, cache_limit)
    if (files := find_files(source, modality)) is not None:
        return open_files(files, modality, column, label_column)
    if column or label_column:
        raise InputError(f"{source}: a folder of {modality.unit} has no columns; omit --column")
    return open_folder(Path(source), modality)


def _has_index(remote: str, cache: Path) -> bool:
    if "*" in remote or remote.lower().endswith(SUFFIXES):
        return False
    if fetch.HUB.fullmatch(remote) and INDEX not in fetch.list_folder(remote)[1]:
        return False
    try:
        fetch_index(remote, cache)
    except InputError as error:
        if error.__cause__ is None or not is_missing(error.__cause__):
            raise
        return False
    return True


def find_files(source: str, modality: Modality) -> Files | None:
    """List the Parquet files or tars of a source: a file, a folder or a glob, local or remote.

    Returns:
        The files; ``None`` for a folder with files of the modality, or without Parquet files and tars.

    Raises:
        InputError: A remote source or a glob has none, or cannot be listed.
    """
    is_remote, others = fetch.is_remote(source), {}
    head, star, _ = source.partition("*")
    root, pattern = source.rstrip("/"), ""
    if star or (source.lower().endswith(SUFFIXES) and not os.path.isdir(source)):
        root = os.path.dirname(head)
        pattern, root = source.removeprefix(root).lstrip("/"), root or "."
    if pattern and not star:
        found = [pattern]
    elif is_remote:
        root, found = fetch.list_folder(root)
        matches = re.escape(pattern or "**/*").replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        found = [path for path in found if re.fullmatch(matches, path)]
    elif pattern:
        found = sorted(glob(pattern, root_dir=root, recursive=True))
    elif not os.path.isdir(root) or _has_samples(root, modality):
        return None
    else:
        listed, others = list_folder(Path(root), SUFFIXES)
        found = [path for path, *_ in listed]
    kinds = [PurePosixPath(path).suffix.lower() for path in found]
    kind = next((suffix for suffix in SUFFIXES if suffix in kinds), None)
    if kind is not None:
        left = Counter(others) + Counter(each or "without suffix" for each in kinds if each != kind)
        return Files(root, [path for path, each in zip(found, kinds, strict=True) if each == kind], left)
    if (on_hub := fetch.HUB.fullmatch(source)) and not on_hub[3] and not on_hub[4]:
        return find_files(f"{source}@{CONVERTED}", modality)
    if is_remote or star:
        raise InputError(f"{source}: no Parquet files or tars{' or, without --local, MDS' if is_remote else ''}")
    return None


def _has_samples(folder: str, modality: Modality) -> bool:
    for _, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        if any(name.lower().endswith(modality.suffixes) and not name.startswith(".") for name in names):
            return True
    return False


def open_split(
    files: Files, split: str | None, modality: Modality, column: str | None = None, label_column: str | None = None
) -> Source:
    """Open the samples of a split; names of classes are those of the split ``train``, if there is one."""
    chosen, train = files.select(split), files.of_split("train")
    known = train and partial(open_files, files._replace(paths=train), modality, column, label_column)
    return open_files(chosen, modality, column, label_column, known if train != chosen.paths else None)


def open_files(
    files: Files,
    modality: Modality,
    column: str | None = None,
    label_column: str | None = None,
    open_train: Callable[[], Source] | None = None,
) -> Source:
    """Open the samples of Parquet files or tars, in the order of the files and in theirs.

    Args:
        files: The files; remote ones are fetched first.
        modality: What the samples are.
        column: See :func:`open_source`.
        label_column: See :func:`open_source`.
        open_train: Opens the samples whose labels, if they are names, are all classes; default: these samples.

    Raises:
        InputError: A file cannot be read, a column is missing or ambiguous, or there are no samples.
    """
    read = _read_tar if files.paths[0].lower().endswith(TAR) else _read_parquet
    workers = min(len(files.paths) - 1, os.cpu_count() or 1)
    listed = map_in_workers(partial(read, files.root, modality, column, label_column), files.paths, workers)
    parts: list[_Part] = [*progress_bar(listed, total=len(files.paths), desc="listing", unit="files")]
    ids, sizes, marks = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "sizes", "marks"))
    left_out = dict(sorted(sum((Counter(part.others) for part in parts), Counter(files.others)).items()))
    if not len(ids):
        found = name_counts(left_out)
        raise InputError(f"{files.root}: no {modality.unit} in {len(parts)} files; other files: {found}")
    ends = np.cumsum([len(part.ids) for part in parts]).tolist()

    def load(number: int) -> bytes:
        part = bisect_right(ends, number)
        return parts[part].load(number - ends[part] + len(parts[part].ids))

    source = Source(
        root=files.root,
        modality=modality,
        ids=ids,
        load=load,
        sizes=sizes,
        marks=marks,
        fingerprint=hash_of(files.root if fetch.is_remote(files.root) else Path(files.root).resolve(), column),
        left_out=left_out,
    )
    if label_column is None:
        return source
    labels, names = [label for part in parts for label in part.labels], parts[0].class_names
    return number_labels(source, labels, names, lambda: open_train().class_names if open_train else ())


def _marks(local: Path, path: str, count: int) -> NDArray[np.int64]:
    status = local.stat()
    return mark_of(path, status.st_size, status.st_mtime_ns) + np.arange(count)


def _read_tar(root: str, modality: Modality, column: str | None, label_column: str | None, path: str) -> _Part:
    """List a tar's samples: adjacent members whose names are equal up to the first dot.

    Raises:
        InputError: The tar is damaged, a sample has several images or no label, or two have one key.
    """
    name, local = f"{root}/{path}", fetch.fetch(f"{root}/{path}")
    others, keys, offsets, sizes, labels = Counter[str](), list[str](), array("q"), array("q"), list[Any]()
    labeled, _, key_of_label = (label_column or "").partition(":")
    with reading(name), tarfile.open(local, "r:") as tar:
        regular = ((MEMBER.fullmatch(each.name) if each.isreg() else None, each) for each in iter(tar.next, None))
        for key, group in groupby(regular, lambda pair: pair[0] and pair[0][1]):
            members = [*group]
            tar.members.clear()  # it would keep all
            if key is None:
                others["members without a key"] += sum(not member.isdir() for _, member in members)
                continue
            fields = {match[2]: member for match, member in members if match}
            known = [field for field in fields if f".{field}".lower().endswith(modality.suffixes)]
            images = [field for field in known if field == (column or field)]
            if len(images) > 1:
                raise InputError(f"{name}/{key}: has {' and '.join(images)}; {CHOOSE}")
            others.update(f".{field}" for field in fields if field not in (*images, labeled))
            if not images:
                others[f"keys without {modality.unit}"] += 1
                continue
            if labeled:
                if labeled not in fields:
                    raise InputError(f"{name}/{key}: has no .{labeled} with its label; it has {', '.join(fields)}")
                with reading(f"{name}/{key}.{labeled}"), cast("Any", tar.extractfile(fields[labeled])) as file:
                    text = file.read().decode().strip()
                    is_number = text.removeprefix("-").isdecimal()
                    labels.append(json.loads(text)[key_of_label] if key_of_label else int(text) if is_number else text)
            keys.append(key)
            offsets.append(fields[images[0]].offset_data)
            sizes.append(fields[images[0]].size)
        cast("Any", tar.fileobj).seek(-1024, os.SEEK_END)
        if any(cast("Any", tar.fileobj).read()):  # tarfile misses a cut between two members
            raise InputError(f"{name}: is truncated: it does not end with two blocks of zeros")
    if len({*keys}) < len(keys):
        twice = next(key for key, count in Counter(keys).items() if count > 1)
        raise InputError(f"{name}: has the key {twice!r} twice, not together")
    if (statistics := local.with_name(f"{local.stem}_stats.json")).exists():  # img2dataset's
        with reading(statistics):
            counts = json.loads(statistics.read_bytes())
            others["failed downloads"] += counts["count"] - counts["successes"]
    ids = np.array([f"{path}/{key}" for key in keys], str)
    load = partial(_load_member, root, local, ids, np.array(offsets), np.array(sizes))
    return _Part(ids, np.array(sizes), load, +others, labels, (), _marks(local, path, len(keys)))


def _load_member(
    root: str, local: Path, ids: NDArray[Any], offsets: NDArray[np.int64], sizes: NDArray[np.int64], number: int
) -> bytes:
    name = f"{root}/{ids[number]}"
    if (size := int(sizes[number])) > MAX_BYTES:
        raise UnreadableSampleError(f"{name}: has {size:,} bytes, more than {MAX_BYTES:,}")
    with reading(name), local.open("rb") as file:
        file.seek(offsets[number])
        return file.read(size)


def _read_parquet(root: str, modality: Modality, column: str | None, label_column: str | None, path: str) -> _Part:
    """List a Parquet file's rows.

    Raises:
        InputError: The file is damaged, or a column is missing, of another type, or ambiguous.
    """
    import pyarrow.parquet

    name, local = f"{root}/{path}", fetch.fetch(f"{root}/{path}")
    with reading(name), pyarrow.parquet.ParquetFile(local) as file:
        schema, metadata = file.schema_arrow, file.metadata
        types = {field.name: str(field.type) for field in schema}
        fits = [[each for each in types if re.fullmatch(kind, types[each])] for kind in (BYTES, PATH)]
        fits = [column] if column else fits[0] or fits[1]
        if len(fits) != 1 or not re.fullmatch(f"{BYTES}|{PATH}", found := types.get(fits[0], "missing")):
            found = f"{fits[0]} is {found}" if column else f"{' and '.join(fits)} fit" if fits else "none fits"
            listed = f"{found}; the columns are {', '.join(types)}; {CHOOSE}"
            raise InputError(f"{name}: expected a column of {modality.unit}, as bytes or paths; {listed}")
        if label_column not in (None, *types):
            raise InputError(f"{name}: no column {label_column!r} of labels; the columns are {', '.join(types)}")
        labels = file.read([label_column])[0].to_pylist() if label_column else []
        hub = json.loads((schema.metadata or {}).get(b"huggingface", "{}")).get("info", {}).get("features", {})
        class_names = hub.get(label_column, {}).get("names", ())
        ids = np.array([f"{path}#{row}" for row in range(metadata.num_rows)], str)
        if re.fullmatch(PATH, found):
            if fetch.is_remote(root):
                raise InputError(f"{name}: its column {fits[0]!r} has paths, which only a local file may have")
            paths = [str(local.parent / (each or "")) for each in file.read(fits)[0].to_pylist()]
            status = [os.stat(each) if os.path.isfile(each) else None for each in paths]
            sizes = np.array([each.st_size if each else 0 for each in status])
            changes = [each and (each.st_size, each.st_mtime_ns) for each in status]
            marks = [*map(mark_of, paths, changes)]
            load = partial(_load_path, np.array(paths, str))
        else:
            groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
            rows = [group.num_rows for group in groups]
            means = [group.total_byte_size // max(group.num_rows, 1) for group in groups]
            sizes, marks = np.repeat(np.array(means, np.int64), rows), _marks(local, path, len(ids))
            load = partial(_load_row, name, local, fits[0], np.cumsum([0, *rows]).tolist())
    return _Part(ids, sizes, load, {}, labels, class_names, np.array(marks))


def _load_path(paths: NDArray[Any], row: int) -> bytes:
    with reading(paths[row]):
        return read_sample_file(Path(paths[row]))


def _load_row(name: str, local: Path, column: str, starts: list[int], row: int) -> bytes:
    group = bisect_right(starts, row) - 1
    with reading(f"{name}, row group {group}"):
        value = _row_group(local, column, group)[row - starts[group]].as_py()
    value = value["bytes"] if isinstance(value, dict) else value
    if value is None:
        raise UnreadableSampleError(f"{name}#{row}: is null")
    return value


@lru_cache(maxsize=1)
def _row_group(local: Path, column: str, group: int) -> Any:
    """Read a row group's samples; each process keeps one."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(local, page_checksum_verification=True) as file:
        return file.read_row_group(group, [column], use_threads=False)[0]
