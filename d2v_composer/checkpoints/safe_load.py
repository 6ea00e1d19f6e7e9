"""Read a training checkpoint, refusing one that is corrupt or that ``recipes/train.py`` did not write."""

import datetime
import pickle
import re
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeGuard

import numpy as np
import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2
from torch.torch_version import TorchVersion

from d2v_composer.system.errors import InputError, reason
from d2v_composer.system.fetch import LARGEST_FILE

# MERGED FROM d2v_composer/checkpoints/safe_load.py: Check the ZIP archive of a PyTorch file before torch reads it,

DIRECTORY = 0x10  # a bit of a ZIP entry's attributes


class BrokenArchiveError(ValueError):
    """An archive with a corrupt directory, or one in which its readers find different files."""


def check_archive(path: Path) -> dict[str, int] | None:
    """Refuse programs and archives that torch.save does not write.

    Returns:
        Key → bytes of each storage; ``None`` for a file that is not an archive.

    Raises:
        BrokenArchiveError: The directory is corrupt.
        ValueError: It is a TorchScript archive, expands to far more bytes, or is a tar archive, whose members torch
            would write to the disk.
    """
    if tarfile.is_tarfile(path):
        raise ValueError("a tar archive, which torch has not written since version 0.1")
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # as torch.load decides
            return None
    # Ask torch's own reader: what it sees as a program is one, whatever zipfile finds.
    records = _records(path)
    if "constants.pkl" in records:
        raise ValueError("a TorchScript archive, which is a program")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.external_attr & DIRECTORY and entry.file_size for entry in entries):
        raise BrokenArchiveError("an archive with a folder that has content")  # torch returns uninitialized memory
    sizes = {entry.filename: entry.file_size for entry in entries}
    found = {name.partition("/")[2].casefold() for name in sizes}
    if found != {name.casefold() for name in records} or len(found) != len(records):
        raise BrokenArchiveError("an archive with several files of one name")
    num_bytes = sum(sizes.values())
    if num_bytes > 2 * path.stat().st_size + (1 << 20):
        raise ValueError(f"an archive that expands to {num_bytes} bytes")
    return {name.rpartition("/data/")[2]: size for name, size in sizes.items() if "/data/" in name}


def _records(path: Path) -> list[str]:
    """Return the names of the files that torch finds in an archive."""
    try:
        reader: Any = torch._C.PyTorchFileReader(str(path))
        return reader.get_all_records()
    except UnicodeDecodeError as error:
        raise BrokenArchiveError(reason(error)) from error
    except RuntimeError as error:
        if "failed reading zip archive" in str(error):  # other errors mean another program's archive
            raise BrokenArchiveError(reason(error)) from error
        raise


# MERGED FROM d2v_composer/checkpoints/safe_load.py: Load PyTorch files from any source without running their code.

# Allowed wrappers around a value: an OmegaConf leaf around an enum's value is two.
MAX_WRAPPERS = 8


class Builder:
    """A function that a pickle may call but not change; the pickle's BUILD would set attributes of a plain one."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("the pickle changes a function")


class PlainDict(dict):
    """Replaces OrderedDict; keeps items and ignores attributes, which torch's state dicts have."""

    def __init__(self, items: Iterable[tuple[Any, Any]] = ()) -> None:
        super().__init__()
        for key, value in items:
            self[_checked_key(key)] = value

    def __setstate__(self, state: Any) -> None:
        pass


BUILT_FOR_REAL = {
    ("collections", "OrderedDict"): PlainDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_parameter"): Builder(_rebuild_parameter),
    ("torch._utils", "_rebuild_tensor_v2"): Builder(_rebuild_tensor_v2),
} | {
    ("torch", str(dtype).removeprefix("torch.")): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


class Stub:
    """Stands for an object of a class that is not loaded. It records all that a pickle does to the object."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Stub":
        stub = super().__new__(cls)
        stub.args = args
        stub.state = {}
        stub.items = []
        return stub

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args: tuple
        self.state: Any
        self.items: list

    def __call__(self, *args: Any, **kwargs: Any) -> "Stub":
        return Stub(*args)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, item: Any) -> None:
        self.items.append(item)

    def extend(self, items: Any) -> None:
        self.items.extend(items)

    add = append


def _checked_key(key: Any) -> Any:
    """Check a dict's key or a set's item. Hashing nested tuples, a few bytes of pickle, can take forever."""
    if isinstance(key, tuple) and any(isinstance(each, tuple) for each in key):
        raise pickle.UnpicklingError("a key of nested tuples")
    return key


def _with_checked_keys(load: Callable[[Any], None], places: slice) -> Callable[[Any], None]:
    """Wrap an operation of the unpickler to check the keys on its stack first."""

    def checked(unpickler: Any) -> None:
        for key in unpickler.stack[places]:
            _checked_key(key)
        load(unpickler)

    return checked


def _load_storage(unpickler: Any) -> None:
    """Load a storage, checking its size: torch reads as many numbers as the pickle says, even beyond the file's end."""
    if unpickler.record_sizes is not None:
        _, storage_type, key, _, num = unpickler.stack[-1]
        if num * storage_type.dtype.itemsize > unpickler.record_sizes.get(key, 0):
            raise pickle.UnpicklingError(f"storage {key} has fewer than {num} numbers")
    PythonUnpickler.load_binpersid(unpickler)


def _refuse(unpickler: Any) -> None:
    # A bytearray is allocated before it is read; frozensets nest like tuples.
    raise pickle.UnpicklingError("a bytearray or frozenset, which checkpoints do not contain")


# Not the one in C, which allocates memory for the highest memo number.
PythonUnpickler: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]
KEYS = {
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: slice(0, None, 2),
    pickle.DICT: slice(0, None, 2),
    pickle.ADDITEMS: slice(0, None),
}


class Unpickler(PythonUnpickler):
    """Builds the globals of :data:`BUILT_FOR_REAL`, and a :class:`Stub` for every other one."""

    dispatch: ClassVar = (
        PythonUnpickler.dispatch
        | {code[0]: _with_checked_keys(PythonUnpickler.dispatch[code[0]], places) for code, places in KEYS.items()}
        | {pickle.BINPERSID[0]: _load_storage}
        | {code[0]: _refuse for code in (pickle.BYTEARRAY8, pickle.FROZENSET)}
    )
    record_sizes: Mapping[str, int] | None = None
    """Key → bytes of the file's storages; ``None`` for the legacy format, which is read in order."""

    def find_class(self, module: str, name: str, /) -> Any:
        return BUILT_FOR_REAL.get((module, name), Stub)


def load(file: BinaryIO, **kwargs: Any) -> Any:
    """Replace ``pickle.load``."""
    return Unpickler(file, **kwargs).load()


class _PickleModule:
    """The part of :mod:`pickle` that ``torch.load`` uses, for one file."""

    __name__ = __name__
    UnpicklingError = pickle.UnpicklingError
    load = staticmethod(load)

    def __init__(self, record_sizes: Mapping[str, int] | None) -> None:
        self.Unpickler = type("Unpickler", (Unpickler,), {"record_sizes": record_sizes})


def load_untrusted(path: Path) -> Any:
    """Load a PyTorch file without running its code, tensors on the CPU.

    Raises:
        InputError: It is truncated, or not a PyTorch file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice to the file's author
            module = _PickleModule(check_archive(path))
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)
    except Exception as error:
        raise InputError(f"{path}: truncated, or not a PyTorch checkpoint ({reason(error)})") from error


def plain(value: Any) -> Any:
    """Return an object that was unpickled as a :class:`Stub` as a dict, list, number or string.

    OmegaConf's nodes become their content, namespaces and other objects their attributes, enums their value. Values
    inside are not converted, because a file may nest without end.
    """
    for _ in range(MAX_WRAPPERS):
        if not isinstance(value, Stub):
            return value
        if isinstance(value.state, dict) and ("_content" in value.state or "_val" in value.state):
            value = value.state.get("_content", value.state.get("_val"))  # OmegaConf's containers and leaves
        elif value.items or value.state:
            return _contents(value)
        elif len(value.args) == 1:
            value = value.args[0]
        else:
            return {}
    return None


def _contents(stub: Stub) -> Any:
    """Return the attributes of an object, or the items of a container."""
    attributes = value if isinstance(value := stub.state, dict) else {}
    named = {item[0]: item[1] for item in stub.items if isinstance(item, tuple) and isinstance(item[0], str)}
    return attributes | named if attributes or named else stub.items


RECONSTRUCT = np.array(0).__reduce__()[0]

# Globals of our checkpoints beyond those that torch allows; numpy 1 has another name for its function.
OUR_GLOBALS = [
    datetime.timedelta,
    np.dtype,
    np.ndarray,
    RECONSTRUCT,
    (RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    TorchVersion,
    *(type(np.dtype(name)) for name in ("uint32", "uint64", "int64", "float64")),
]

# Composer evaluates a checkpoint's entries for algorithms as Python expressions.
OUR_ALGORITHMS = {"CutMix", "EMA", "GradientClipping", "GradientNorm", "LabelSmoothing", "MixUp"}


class CorruptCheckpointError(InputError):
    """A checkpoint that is truncated or corrupt."""


def is_trained(contents: Any) -> TypeGuard[dict[str, Any]]:
    """Return whether the contents of a file are those of a Composer checkpoint."""
    return isinstance(contents, dict) and "state" in contents


def read_checkpoint(path: Path | str, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Load a checkpoint that names no other global than ours; the first other one raises UnpicklingError."""
    with torch.serialization.safe_globals(OUR_GLOBALS):
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)


def check_checkpoint(path: Path) -> None:
    """Verify a training checkpoint's checksums, then its contents, without running its code.

    Raises:
        CorruptCheckpointError: It is truncated or corrupt.
        InputError: It does not exist, or ``recipes/train.py`` did not write it.
    """
    foreign = f"{path}: is not a checkpoint of recipes/train.py"
    if path.is_file() and path.stat().st_size > LARGEST_FILE:
        raise InputError(f"{foreign}: it has {path.stat().st_size} bytes")
    _check_sums(path)
    try:
        check_archive(path)
        load_untrusted(path)  # limits time and memory, which torch.load does not
        algorithms = [name for name, _ in read_checkpoint(path, mmap=True)["state"]["algorithms"]]
    except BrokenArchiveError as error:
        raise CorruptCheckpointError(f"{path}: truncated, corrupt, or not a checkpoint ({reason(error)})") from error
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+) (was not|whose module)", str(error))
        what = f"it names {name[1]}, which none of ours does" if name else reason(error)
        raise InputError(f"{foreign}, and is not loaded: {what}") from error
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{foreign} ({reason(error)})") from error
    if not OUR_ALGORITHMS.issuperset(algorithms):
        raise InputError(f"{foreign}: it has the algorithms {algorithms}, allowed are {sorted(OUR_ALGORITHMS)}")


def _check_sums(path: Path) -> None:
    """Compare each record of the ZIP archive with its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            corrupt = archive.testzip()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise CorruptCheckpointError(f"{path}: truncated, corrupt, or not a checkpoint ({reason(error)})") from error
    if corrupt is not None:
        raise CorruptCheckpointError(f"{path}: corrupt: the checksum of its {corrupt} is wrong")
