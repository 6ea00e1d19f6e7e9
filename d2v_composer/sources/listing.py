"""List the files of a source, and read a listed file only if it has not changed."""

import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple, TypeVar

from typing_extensions import Self

from d2v_composer.sources import path_of
from d2v_composer.system.addresses import STORES
from d2v_composer.system.errors import InputError, RunError, reading, reason
from d2v_composer.system.fetch import HUB, READ_SECONDS, File, fetch, is_remote, list_store

# The branch of a data set on the hub to which the hub's bot writes the other branches' files as Parquet.
CONVERTED = "refs/convert/parquet"
# Kinds of files that are left out, besides those with other suffixes.
LINKS, SPECIAL = "links to files or folders already listed", "special files"

ResultT = TypeVar("ResultT")


class Listing(NamedTuple):
    """The files of a source."""

    root: str
    """Folder or address to which the files' paths are relative; on the hub, with the commit."""
    files: list[File]
    """The listed files, sorted by path."""
    left_out: Mapping[str, int]
    """Kind of files that are left out → their number."""
    is_chosen: bool
    """True if the source is a file or a glob, and not a folder."""


class FileSnapshot(NamedTuple):
    """A listed local file, or the local copy of a listed remote file."""

    name: str
    """Path or address of the listed file."""
    path: Path
    """Path of the local file or the copy."""
    file: File
    """The file as listed or, if its store reports no version, a description of the copy."""
    expected: File | None
    """Description of the file at ``path``, which must not change; ``None`` if changes are not checked."""

    @classmethod
    def of(cls, root: str, file: File) -> Self:
        """Fetch a listed file if it is remote, and return its snapshot."""
        name = f"{root}/{file.path}"
        path = fetch(name, file.version)
        if file.version:
            return cls(name, path, file, None if is_remote(name) else file)
        copy = File.of(file.path, path)
        return cls(name, path, copy._replace(version=""), copy)

    def read(self, function: Callable[[BinaryIO], ResultT], what: str = "", *, again: bool = False) -> ResultT:
        """Call a function with the opened file, and return its result. A damaged copy is fetched once more."""
        copied = is_remote(self.name)
        try:
            with self.path.open("rb") as file:
                try:
                    return function(file)
                finally:
                    if self.expected not in (None, File.of(self.file.path, file.fileno())):
                        raise RunError(f"{self.name} has changed since it was listed; run the same command again")
        except (ImportError, InputError, RunError):
            raise
        except Exception:
            if again or not copied:
                with reading(f"{self.name}{what}" + (f", copied to {self.path}," if copied else "")):
                    raise
        fetch(self.name, "" if self.expected else self.file.version, again=True)
        return self.read(function, what, again=True)


def list_files(source: str, suffixes: tuple[str, ...], needs: Mapping[str, str]) -> Listing | None:
    """List the files of a source that have one of ``suffixes``, and count the files that are left out.

    If the source is a local file, the file may have any suffix. Hidden files and folders are left out. Links are
    followed, but each file is listed only once.

    Args:
        source: A file, a folder or a glob, in which ``**`` stands for any number of folders: a local path, an address,
            or hf://datasets/ORG/NAME[@REVISION][/PATH].
        suffixes: Suffixes in lowercase.
        needs: See :attr:`Modality.needs <d2v_composer.data.modality.Modality.needs>`.

    Returns:
        The listing; ``None`` for a folder or a glob on a server that cannot list its files.

    Raises:
        InputError: The source cannot be listed, or is ambiguous.
    """
    head, star, _ = source.partition("*")
    root, pattern = source.rstrip("/"), ""
    if star or (source.lower().endswith(suffixes) if is_remote(source) else os.path.isfile(source)):
        root = os.path.dirname(head)
        pattern, root = source.removeprefix(root).lstrip("/"), root or "."
    name, glob = "" if star else pattern, pattern.split("/") if pattern else ["**"]
    left_out, by_identity = Counter[str](), dict[object, File]()
    if not is_remote(source):
        with reading(source):
            entries = [(File.of(name, source), None)] if name else [*_list_disk(root, glob, left_out)]
    else:
        if source.startswith("hf://"):
            root, files = _list_hub(root, suffixes, pattern)
        elif source.startswith(tuple(f"{scheme}://" for scheme in STORES)):
            files = list_store(root, name)
        elif name:
            files = [File(name)]
        else:
            return None
        entries = [(file, file.path) for file in files]
    for file, identity in entries:
        parts, suffix = file.path.split("/"), PurePosixPath(file.path).suffix.lower()
        if file.path != name and len(glob) not in matched_parts(glob, parts):
            continue
        if not path_of(file.path):
            left_out["hidden"] += 1
        elif file.path != name and suffix not in suffixes:
            left_out[f"{suffix} (needs {needs[suffix]})" if suffix in needs else suffix or "without suffix"] += 1
        elif by_identity.setdefault(identity, file) is not file:
            left_out[LINKS] += 1
    return Listing(root, sorted(by_identity.values()), dict(sorted(left_out.items())), pattern != "")


def matched_parts(glob: Sequence[str], parts: Sequence[str]) -> frozenset[int]:
    """Return all numbers n for which the first n parts of a glob match the whole path, given as ``parts``."""
    counts = {0}
    for part in ("", *parts):
        if part:
            fitting = (count for count in counts if count < len(glob) and fnmatchcase(part, glob[count]))
            counts = {count + (glob[count] != "**") for count in fitting}
        counts |= {count + 1 for count in counts if glob[count : count + 1] == ["**"]}
    return frozenset(counts)


def _list_disk(root: str, glob: Sequence[str], left_out: Counter[str]) -> Iterator[tuple[File, object]]:
    """Yield the files below a folder, links last, each with an object that identifies the file on the disk."""
    seen, named, links = set[object](), deque([""]), deque[str]()
    while named or links:
        path = (named or links).popleft()
        place, parts = os.path.join(root, path), path.split("/") if path else []
        if parts and parts[-1].startswith("."):
            yield File(path), path
            continue
        try:
            status = os.stat(place)
        except OSError:  # a dangling link counts as unreadable when it is read, as a corrupt file does
            status = os.lstat(place)
        # Some file systems have no inodes.
        identity = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(place)
        if path and not stat.S_ISDIR(status.st_mode):
            is_file = stat.S_ISREG(status.st_mode)
            if is_file or stat.S_ISLNK(status.st_mode):
                yield File.of(path, place, status) if is_file else File(path), identity
            elif len(glob) in matched_parts(glob, parts):
                left_out[SPECIAL] += 1
            continue
        # What is in a folder may fit a glob by one of its names, and not by another.
        counts = matched_parts(glob, parts)
        if (identity, counts) in seen:
            left_out[LINKS] += 1
        elif counts - {len(glob)}:
            seen.add((identity, counts))
            for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
                (links if entry.is_symlink() else named).append("/".join([*parts, entry.name]))


def _list_hub(folder: str, suffixes: tuple[str, ...], chosen: str) -> tuple[str, list[File]]:
    """List the files of a data set on the Hugging Face hub.

    If a whole data set, without a revision, has no file with a wanted suffix, list the hub's conversion to Parquet.

    Returns:
        The address of the folder, with the commit; and the files in the folder.
    """
    from huggingface_hub import HfApi

    if (on_hub := HUB.fullmatch(folder)) is None or not on_hub[1]:
        raise InputError(f"{folder}: expected hf://datasets/ORG/NAME[@REVISION][/FOLDER]")
    _, repository, revision, inside = on_hub.groups()
    try:
        info = HfApi().dataset_info(repository, revision=revision, timeout=READ_SECONDS)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be listed ({reason(error)[:200]})") from error
    commit, paths = info.sha or "", [sibling.rfilename for sibling in info.siblings or ()]
    configurations = {config["config_name"] for config in (info.card_data or {}).get("configs") or ()}
    inside = f"{inside}/" if inside else ""
    files = [File(path.removeprefix(inside), version=commit) for path in sorted(paths) if path.startswith(inside)]
    wanted = [file.path for file in files if file.path.lower().endswith(suffixes)]
    if not (revision or inside or chosen or wanted):
        return _list_hub(f"{folder}@{CONVERTED}", suffixes, chosen)
    if revision == CONVERTED:
        configurations = {path.partition("/")[0] for path in wanted}
    if len(configurations) > 1 and not (inside or chosen):
        names, folders = (
            ", ".join(sorted(choices)) for choices in (configurations, {*map(os.path.dirname, wanted)} - {""})
        )
        choices = f"a glob or one of the folders {folders}" if folders else "a glob"
        raise InputError(f"{folder} has the configurations {names}; append {choices}")
    cut = [path for path in wanted if "/partial-" in f"/{path}"]
    if cut and "partial-" not in chosen:
        raise InputError(
            f"{folder}: the hub has converted only a part of this data set to Parquet; to read this part, use "
            f"{folder}/{os.path.dirname(cut[0])}"
        )
    return f"hf://datasets/{repository}@{commit}/{inside}".rstrip("/"), files
