"""Read PyTorch files of any program, without running code in them or exhausting time or memory."""

import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from d2v_composer.system.errors import InputError, reason
from d2v_composer.system.fetch import LARGEST_FILE

# Bytes of pickled Python objects, without the tensors' numbers. A data2vec 2.0 checkpoint has 0.3 MB.
MAX_PICKLE_BYTES = 8 << 20
# Tuples within a tuple. Each may hold the same one twice, and hashing 60 of them would take 2^60 steps.
MAX_TUPLES = 1000
# torch knows this function, which allocates as many bytes as the file asks for; the names in Python 3 and 2.
ALLOCATES = ("builtins bytearray", "__builtin__ bytearray")
DIRECTORY = 0x10  # a bit of a ZIP entry's attributes


class Stub(dict[Any, Any]):
    """Stand-in for an object whose class is not loaded: a dict of the object's attributes and items."""

    __hash__: Any = object.__hash__  # an enum may be a key

    def __init__(self, *args: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        self.update(state if isinstance(state, dict) else {})


def load_untrusted(path: Path) -> Any:
    """Load any program's PyTorch file without running its code; its tensors are on the CPU, memory-mapped."""
    check_archive(path)
    with _reading(path, InputError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice to the file's author
        stubs: list[Any] = [(Stub, name) for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)]
        with torch.serialization.safe_globals(stubs):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def is_checkpoint(contents: object) -> bool:
    """Return True if the contents of a file have the form of a Composer checkpoint: a dict with the key ``state``."""
    return isinstance(contents, dict) and "state" in contents


def check_archive(path: Path, kind: type[InputError] = InputError) -> None:
    """Check the sizes, checksums and pickle of a PyTorch file."""
    with _reading(path, kind):
        num_bytes = path.stat().st_size
        if num_bytes > LARGEST_FILE:
            raise ValueError(f"it has {num_bytes} bytes; the limit is {LARGEST_FILE}")
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":  # torch would read another format with other code
                raise ValueError(
                    "not a PyTorch archive; if torch < 1.6 wrote the file, save it again with a newer torch"
                )
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            is_odd = any(entry.compress_type or entry.external_attr & DIRECTORY for entry in entries)
            if is_odd or sum(entry.file_size for entry in entries) > num_bytes:
                raise ValueError(
                    "its archive has a folder, a compressed file or overlapping files, which torch never writes"
                )
            if len({entry.filename.casefold() for entry in entries}) != len(entries):  # torch may read another one
                raise ValueError("its archive has files whose names are equal or differ only in upper and lower case")
            if (broken := archive.testzip()) is not None:  # torch maps the tensors into memory without a look
                raise ValueError(f"the checksum of {broken} in its archive is wrong")
            pickled = archive.getinfo(f"{entries[0].filename.partition('/')[0]}/data.pkl")
            if pickled.file_size > MAX_PICKLE_BYTES:
                raise ValueError(f"its pickle has {pickled.file_size} bytes; the limit is {MAX_PICKLE_BYTES}")
            _check_pickle(archive.read(pickled))


@contextmanager
def _reading(path: Path, kind: type[InputError]) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:
        raise kind(f"{path}: cannot be loaded as a PyTorch file ({fault_of(error)})") from error


def fault_of(error: Exception) -> str:
    """Return an error's cause in one line, without the advice of torch's unpickler."""
    match = re.search(r"GLOBAL \S+|WeightsUnpickler error: (?!.*GLOBAL).*", str(error))
    return match[0] if match else reason(error)


def _check_pickle(pickled: bytes) -> None:
    """Check a pickle's instructions without building any object."""
    # For each object in the pickle: how many tuples it is made of.
    stack, marks, memo = list[int](), list[int](), dict[object, int]()
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
            if stack[-1] > MAX_TUPLES:
                raise ValueError(f"its pickle has more than {MAX_TUPLES} tuples within a tuple")
        elif "PUT" in opcode.name:
            memo[argument] = stack[-1]
        elif "GET" in opcode.name:
            stack.append(memo[argument])
        elif argument in ALLOCATES:
            raise ValueError(f"its pickle uses {argument}, which no checkpoint needs")
        else:
            stack.extend([0] * len(opcode.stack_after))
