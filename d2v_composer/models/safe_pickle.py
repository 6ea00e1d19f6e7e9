"""Reading a pickle that a stranger may have written.

``torch.load`` takes a module in place of :mod:`pickle`; this is one. It builds tensors and plain containers. Any
other global that the pickle names (a class we lack, ``os.system``) becomes an inert :class:`Stub` that remembers
what it was given, and is neither imported nor called.
"""

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

from d2v_composer.errors import InputError

__all__ = ["Stub", "load_untrusted", "plain"]

BUILT_FOR_REAL = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
} | {
    ("torch", str(dtype).removeprefix("torch.")): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


class Stub:
    """Stands in for an object of a class that is not loaded. Every way in which a pickle fills an object ends here."""

    global_name = ""

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
        self.items.append(items)

    add = append


class Unpickler(pickle.Unpickler):
    """Builds what :data:`BUILT_FOR_REAL` lists; everything else that a pickle names becomes a :class:`Stub`."""

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in BUILT_FOR_REAL:
            return BUILT_FOR_REAL[module, name]
        return type("Stub", (Stub,), {"global_name": f"{module}.{name}"})


def load(file: BinaryIO, **kwargs: Any) -> Any:
    """``pickle.load``, for the places where torch calls it."""
    return Unpickler(file, **kwargs).load()


class _PickleModule:
    """What ``torch.load`` uses of the :mod:`pickle` module."""

    __name__ = __name__
    Unpickler = Unpickler
    UnpicklingError = pickle.UnpicklingError
    load = staticmethod(load)


def load_untrusted(path: Path) -> Any:
    """Load a PyTorch file without running any of its code, tensors on the CPU.

    Raises:
        InputError: It is truncated, or no PyTorch file.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # a global that torch does not know; TorchScript, a program, raises another
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PickleModule())
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: truncated, or not a PyTorch checkpoint ({reason})") from error


def plain(value: Any) -> Any:
    """Containers and numbers out of what was unpickled: OmegaConf's nodes, namespaces and enums lose their class."""
    if isinstance(value, Stub):
        if isinstance(value.state, dict):
            for content in ("_content", "_val"):  # OmegaConf's containers and leaves
                if content in value.state:
                    return plain(value.state[content])
        if value.state:
            return plain(value.state)
        return plain(value.args[0]) if len(value.args) == 1 else [plain(item) for item in value.args]
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
