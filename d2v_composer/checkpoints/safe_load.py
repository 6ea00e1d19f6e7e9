"""Read PyTorch files from any source, without running their code or exhausting time or memory.

torch's ``weights_only`` interpreter calls only functions that it knows to be safe; the classes that fairseq, OmegaConf
or a training program name are replaced by :class:`Stub`. What it does not check is checked before it starts.
"""

import datetime
import pickletools
import re
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from d2v_composer.system.errors import InputError, reading, reason
from d2v_composer.system.fetch import LARGEST_FILE, fetch, is_remote

LATEST = "latest-rank0.pt"
# Bytes of pickled Python objects, without the tensors' numbers. A data2vec 2.0 checkpoint has 0.3 MB.
LARGEST_PICKLE = 8 << 20
# Tuples within a tuple. Each may hold the same one twice, and hashing 60 of them would take 2^60 steps.
MOST_TUPLES = 1000
# torch knows this function, which allocates as many bytes as the file asks for; the names in Python 3 and 2.
ALLOCATES = ("builtins bytearray", "__builtin__ bytearray")
DIRECTORY = 0x10  # a bit of a ZIP entry's attributes
# A run may save a newer checkpoint and remove the one that is being read; its pointer is missing for a moment.
READ_ATTEMPTS, READ_PAUSE = 20, 0.05

ReadT = TypeVar("ReadT")

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
OUR_ALGORITHMS = {"CutMix", "GradientClipping", "GradientNorm", "LabelSmoothing", "MixUp"}


class CorruptCheckpointError(InputError):
    """A truncated or corrupt checkpoint; a resumed run uses the one before it."""


class Stub(dict[Any, Any]):
    """Stand-in for an object of a class that is not loaded; holds its attributes and items."""

    __hash__: Any = object.__hash__  # an enum may be a key

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.update(state if isinstance(state, dict) else {})


def load_untrusted(path: Path) -> Any:
    """Load any program's PyTorch file; its tensors are on the CPU, and are read from disk when used.

    Raises:
        InputError: It cannot be read, or is truncated, corrupt, or not a PyTorch file.
    """
    with _reading(path, InputError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice to the file's author
        _inspect(path)
        stubs: list[Any] = [(Stub, name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)]
        with torch.serialization.safe_globals(stubs):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def is_trained(contents: Any) -> bool:
    """Return True if the contents of a file are a Composer checkpoint."""
    return isinstance(contents, dict) and "state" in contents


def read_checkpoint(path: Path | str, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a checkpoint that refers only to the classes and functions we allow; any other raises UnpicklingError."""
    with torch.serialization.safe_globals(OUR_GLOBALS):
        # Without mmap, torch reads as many numbers as the pickle says, even if the record has fewer.
        return torch.load(path, map_location=map_location, weights_only=True, mmap=True)


def check_checkpoint(path: Path) -> None:
    """Verify a training checkpoint's checksums, then its contents, without running its code.

    Raises:
        CorruptCheckpointError: It is truncated or corrupt.
        InputError: It cannot be read, or ``recipes/train.py`` did not write it.
    """
    with _reading(path, CorruptCheckpointError):
        _inspect(path)
    foreign = f"{path}: is not a checkpoint written by recipes/train.py"
    try:
        state = read_checkpoint(path)["state"]
        algorithms, tensors = [name for name, _ in state["algorithms"]], list(state["model"].values())
    except Exception as error:
        if isinstance(error, RuntimeError):  # torch's reader of archives
            raise CorruptCheckpointError(f"{path}: truncated or corrupt ({_reason(error)})") from error
        raise InputError(f"{foreign} ({_reason(error)})") from error
    if not OUR_ALGORITHMS.issuperset(algorithms):
        raise InputError(f"{foreign}: it has the algorithms {algorithms}; allowed are {sorted(OUR_ALGORITHMS)}")
    # Composer does not load strictly: it would train on from random weights.
    if not tensors or not all(isinstance(each, Tensor) and each.isfinite().all() for each in tensors):
        raise InputError(f"{foreign}: its state.model must hold tensors of finite numbers, and nothing else")


@contextmanager
def _reading(path: Path, kind: type[InputError]) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except Exception as error:
        raise kind(f"{path}: truncated, or not a PyTorch checkpoint ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """Return an error's first line; for torch's unpickler, only what stopped it, without torch's advice."""
    found = re.search(r"GLOBAL \S+|WeightsUnpickler error: (?!.*GLOBAL).*", str(error))
    return found[0] if found else reason(error)


def _inspect(path: Path) -> None:
    """Before torch reads an archive, check what torch does not: sizes, checksums, and the pickle.

    Raises:
        ValueError: It would take too much time or memory, or a checksum is wrong.
        zipfile.BadZipFile: It is no archive.
    """
    num_bytes = path.stat().st_size
    if num_bytes > LARGEST_FILE:
        raise ValueError(f"it has {num_bytes} bytes; the limit is {LARGEST_FILE}")
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch would read another format with other code
            raise ValueError("not a PyTorch archive; save an older file again with torch >= 1.6")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        is_odd = any(each.compress_type or each.external_attr & DIRECTORY for each in entries)
        if is_odd or sum(each.file_size for each in entries) > num_bytes:
            raise ValueError("an archive of compressed or overlapping files or folders, which torch does not write")
        if len({each.filename.casefold() for each in entries}) != len(entries):  # torch may read another one
            raise ValueError("an archive with several files of the same name")
        if (broken := archive.testzip()) is not None:  # torch maps the tensors into memory without a look
            raise ValueError(f"the checksum of its {broken} is wrong")
        pickled = archive.getinfo(f"{entries[0].filename.partition('/')[0]}/data.pkl")
        if pickled.file_size > LARGEST_PICKLE:
            raise ValueError(f"its pickle has {pickled.file_size} bytes; the limit is {LARGEST_PICKLE}")
        _check_pickle(archive.read(pickled))


def _check_pickle(pickled: bytes) -> None:
    """Check a pickle's instructions without building any object.

    Raises:
        ValueError: It would take torch's interpreter too long, or more memory than the file has numbers.
    """
    # For each object in the pickle: how many tuples it is made of.
    stack, marks, memo = list[int](), list[int](), dict[Any, int]()
    for opcode, argument, _ in pickletools.genops(pickled):
        needed = opcode.stack_before
        if pickletools.markobject in needed:
            start = marks.pop()
            below = needed.index(pickletools.markobject)
        else:
            start, below = len(stack) - len(needed), 0
        taken = stack[start:]
        del stack[start - below :]
        if opcode.name == "MARK":
            marks.append(len(stack))
        elif opcode.name.startswith("TUPLE"):
            stack.append(1 + sum(taken))
            if stack[-1] > MOST_TUPLES:
                raise ValueError(f"more than {MOST_TUPLES} nested tuples")
        elif "PUT" in opcode.name:
            memo[argument] = stack[-1]
        elif "GET" in opcode.name:
            stack.append(memo[argument])
        elif argument in ALLOCATES:
            raise ValueError(f"it names {argument}, which no checkpoint needs")
        else:
            stack.extend([0] * len(opcode.stack_after))


def read_newest(path: Path, read: Callable[[Path], ReadT]) -> ReadT:
    """Read a file, or the target of a run's pointer; retry if the run has replaced it meanwhile.

    Raises:
        InputError, OSError: ``read``'s, of a file that is still the newest.
    """
    for attempt in range(READ_ATTEMPTS):
        with reading(path):
            file = path.resolve()
        try:
            return read(file)
        except (InputError, OSError):
            if attempt == READ_ATTEMPTS - 1 or (file.exists() and path.resolve() == file):
                raise
            time.sleep(READ_PAUSE)
    raise AssertionError  # the last attempt returned or raised


def fetch_model(path: str | Path) -> Path:
    """Return a file's local path, as :func:`fetch` does; for a run's folder, the error names its newest checkpoint."""
    with reading(path):
        if not is_remote(path) and (newest := Path(path) / LATEST).exists():
            raise InputError(f"{path}: is the folder of a run, not a model's file; its newest checkpoint is {newest}")
    return fetch(path)
