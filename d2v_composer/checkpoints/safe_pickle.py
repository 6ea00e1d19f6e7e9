"""Load PyTorch files from any source without running their code.

``torch.load`` accepts a substitute for :mod:`pickle`; this is one. It builds tensors and plain containers. Any other
global that a pickle names (a missing class, ``os.system``) becomes an inert :class:`Stub`, which records its arguments
and is neither imported nor called.

Threats of model files and what stops them. Tests are in tests/checkpoints/test_safe_pickle.py (P),
tests/faults/test_hostile_files.py (H), tests/checkpoints/test_resume.py (R) and test_altered_sizes.py (A):

=====================================  ==========================================================  ====================
Threat                                 Stopped by                                                  Test
=====================================  ==========================================================  ====================
a pickle calls a function              ``Unpickler.find_class`` builds stubs                       P no_code_of_a_file
a pickle changes torch's functions     ``Builder.__setstate__`` raises                             P cannot_change
a pickle replaces a dict's methods     ``PlainDict.__setstate__`` ignores attributes               P cannot_replace
torch.load runs or writes a program    ``check_archive`` refuses TorchScript and tar archives      P torchscript, H tar
a tensor ends behind its file          ``_load_storage`` compares sizes                            H beyond_the_end
a small archive expands to gigabytes   ``check_archive`` adds up the sizes                         H all_memory_or_time
huge memo, bytearray, nested keys      the unpickler in Python, ``_refuse``, ``_checked_key``      H all_memory_or_time
readers find different files           ``check_archive`` compares zipfile's with torch's           R corrupt, directory
a resumed checkpoint names code        ``composer_checkpoint``: ``weights_only`` and a list of     R no_code_of_a
                                       globals, in the check and in Composer's load
Composer evaluates algorithms' names   ``composer_checkpoint`` compares with its list              R no_code_of_a
truncated or flipped bits              ``composer_checkpoint`` verifies checksums                  R corrupt
sizes that exhaust the memory          ``stored_config`` builds on the meta device first           H sizes_that, A
JSON that is deep or has huge numbers  ``safetensors_file.parse_object``                           H sizes_that, A
=====================================  ==========================================================  ====================
"""

import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

from d2v_composer.checkpoints.torch_archive import check_archive
from d2v_composer.system.errors import InputError
from d2v_composer.system.retry import reason

__all__ = ["Stub", "load_untrusted", "plain"]

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
