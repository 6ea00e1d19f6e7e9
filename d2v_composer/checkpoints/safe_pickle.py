"""Reading a pickle that a stranger may have written.

``torch.load`` takes a module in place of :mod:`pickle`; this is one. It builds tensors and plain containers. Any
other global that the pickle names (a class we lack, ``os.system``) becomes an inert :class:`Stub` that remembers
what it was given, and is neither imported nor called.
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


# How deep one value may be wrapped: an OmegaConf leaf around an enum's value is two.
MAX_WRAPPERS = 8


class Builder:
    """A function that a pickle may call, but neither fill nor change: the pickle's BUILD sets attributes otherwise."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a pickle that changes a function")


class PlainDict(dict):
    """torch's state dicts are OrderedDicts with attributes; these keep the items alone."""

    def __init__(self, items: Iterable[tuple[Any, Any]] = ()) -> None:
        super().__init__()
        for key, value in items:
            self[checked_key(key)] = value

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
    """Stands in for an object of a class that is not loaded. Every way in which a pickle fills an object ends here."""

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


def checked_key(key: Any) -> Any:
    """A dict's key, or a set's item. To hash tuples of tuples, a few bytes of pickle, may take for ever."""
    if isinstance(key, tuple) and any(isinstance(each, tuple) for each in key):
        raise pickle.UnpicklingError("a key of nested tuples")
    return key


def _with_checked_keys(load: Callable[[Any], None], places: slice) -> Callable[[Any], None]:
    """An operation of an unpickler that first looks at the keys among what lies on its stack."""

    def checked(unpickler: Any) -> None:
        for key in unpickler.stack[places]:
            checked_key(key)
        load(unpickler)

    return checked


def _load_storage(unpickler: Any) -> None:
    """A storage, of which torch reads as many numbers as the pickle says, also from behind the end of what there is."""
    if unpickler.record_sizes is not None:
        _, storage_type, key, _, num = unpickler.stack[-1]
        if num * storage_type.dtype.itemsize > unpickler.record_sizes.get(key, 0):
            raise pickle.UnpicklingError(f"storage {key} has fewer than {num} numbers")
    PythonUnpickler.load_binpersid(unpickler)


def _refuse(unpickler: Any) -> None:
    # A bytearray is made before there is anything to fill it; frozensets nest as tuples do.
    raise pickle.UnpicklingError("an object that no checkpoint needs")


# Not the one in C: there, the number of a memo is how much memory is set aside.
PythonUnpickler: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]
KEYS = {
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: slice(0, None, 2),
    pickle.DICT: slice(0, None, 2),
    pickle.ADDITEMS: slice(0, None),
}


class Unpickler(PythonUnpickler):
    """Builds what :data:`BUILT_FOR_REAL` lists; everything else that a pickle names becomes a :class:`Stub`."""

    dispatch: ClassVar = (
        PythonUnpickler.dispatch
        | {code[0]: _with_checked_keys(PythonUnpickler.dispatch[code[0]], places) for code, places in KEYS.items()}
        | {pickle.BINPERSID[0]: _load_storage}
        | {code[0]: _refuse for code in (pickle.BYTEARRAY8, pickle.FROZENSET)}
    )
    record_sizes: Mapping[str, int] | None = None
    """Of the file's storages, by key, in bytes; ``None`` for a format that is read in order."""

    def find_class(self, module: str, name: str, /) -> Any:
        return BUILT_FOR_REAL.get((module, name), Stub)


def load(file: BinaryIO, **kwargs: Any) -> Any:
    """``pickle.load``, for the places where torch calls it."""
    return Unpickler(file, **kwargs).load()


class _PickleModule:
    """What ``torch.load`` uses of the :mod:`pickle` module, for one file."""

    __name__ = __name__
    UnpicklingError = pickle.UnpicklingError
    load = staticmethod(load)

    def __init__(self, record_sizes: Mapping[str, int] | None) -> None:
        self.Unpickler = type("Unpickler", (Unpickler,), {"record_sizes": record_sizes})


def load_untrusted(path: Path) -> Any:
    """Load a PyTorch file without running any of its code, tensors on the CPU.

    Raises:
        InputError: It is truncated, or no PyTorch file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's advice to whoever wrote the file
            module = _PickleModule(check_archive(path))
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=module)
    except Exception as error:
        raise InputError(f"{path}: truncated, or not a PyTorch checkpoint ({reason(error)})") from error


def plain(value: Any) -> Any:
    """One level of what was unpickled without its class: a dict, a list, a number, a string.

    OmegaConf's nodes give their content, namespaces and other objects their attributes, enums their value. Only one
    level, since a stranger's file may nest without end.
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
    """The attributes of an object, or the items of a container."""
    attributes = value if isinstance(value := stub.state, dict) else {}
    named = {item[0]: item[1] for item in stub.items if isinstance(item, tuple) and isinstance(item[0], str)}
    return attributes | named if attributes or named else stub.items
