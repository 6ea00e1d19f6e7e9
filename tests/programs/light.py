"""Run commands of d2v, one in each line of the input, where the packages of the extra 'train' cannot be imported.

With macos or windows as argument, on Linux also without the modules and functions which that system lacks; as windows,
no file is renamed or removed while it is open. Text files without an encoding are refused: Windows would read them in
another one.
"""

import ctypes
import importlib
import io
import os
import shlex
import signal
import sys
import warnings
from functools import partial
from typing import Any

# What takes seconds to import; what of it a command has imported is printed after it.
HEAVY = ("matplotlib", "sympy", "timm", "torch", "torch._dynamo", "torch.distributed.fsdp", "torchvision")
EXTRA = ("boto3", "botocore", "composer", "streaming", "torchmetrics")
# What packages of others use on Linux is imported before it is taken away.
IMPORTED_BEFORE = ("matplotlib.pyplot", "psutil", "soundfile", "timm", "torch.utils.data", "torchvision")
BEYOND_MACOS = {
    os: ("memfd_create", "pidfd_open", "posix_fallocate", "sched_getaffinity", "sched_setaffinity"),
}
BEYOND_WINDOWS = {
    os: (*BEYOND_MACOS[os], "fork", "forkpty", "getpgid", "killpg", "mkfifo", "pread", "pwrite", "setsid", "statvfs"),
    signal: ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "pthread_kill", "pthread_sigmask", "setitimer", "sigwait"),
}


class Blocked:
    """Finds no module of the extra."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] in EXTRA:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def become(system: str) -> None:
    """Take away what Linux has beyond another system."""
    for name in IMPORTED_BEFORE:
        importlib.import_module(name)
    for module, names in {"macos": BEYOND_MACOS, "windows": BEYOND_WINDOWS}[system].items():
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    for name in ("fcntl", "resource", "termios") if system == "windows" else ():
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]
    if system == "macos":
        sys.platform = "darwin"
    if system == "windows":
        for name in ("remove", "rename", "replace", "unlink"):
            setattr(os, name, partial(if_not_open, getattr(os, name)))
    io.open = without_proc
    ctypes.CDLL = Library


def if_not_open(call: Any, *paths: Any, dir_fd: int | None = None, **options: Any) -> Any:
    """Rename or remove a file unless this process has it open or mapped."""
    folder = "" if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
    used = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
    with open("/proc/self/maps", encoding="utf-8") as maps:
        used |= {line.split(maxsplit=5)[-1].strip() for line in maps}
    for path in paths:
        if os.path.realpath(os.path.join(folder, path)) in used:
            raise PermissionError(13, "it is in use", str(path))
    return call(*paths, **options if dir_fd is None else {"dir_fd": dir_fd})


def without_proc(file: Any, *arguments: Any, **options: Any) -> Any:
    if str(file).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", str(file))
    return open(file, *arguments, **options)


class Library(ctypes.CDLL):
    """A library that has no prctl; on Windows there is none without a name."""

    def __init__(self, name: str | None, *arguments: Any, **options: Any) -> None:
        if name is None and sys.argv[1] == "windows":
            raise TypeError
        super().__init__(name, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        if name == "prctl":
            raise AttributeError(name)
        return super().__getattr__(name)


sys.meta_path.insert(0, Blocked())
if len(sys.argv) > 1:
    become(sys.argv[1])
warnings.filterwarnings("error", category=EncodingWarning, module="d2v_composer")

from d2v_composer.commands.__main__ import main  # noqa: E402
from d2v_composer.system import command_line  # noqa: E402

*before, last = map(shlex.split, sys.stdin)
for arguments in before:
    main(arguments)
    print("imported:", *(name for name in HEAVY if name in sys.modules))
sys.argv = ["d2v", *last]
command_line.run(main)
