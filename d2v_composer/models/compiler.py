"""Find the compiler that torch.compile needs."""

import os
import shutil
import sysconfig
from pathlib import Path

__all__ = ["find_missing"]


def find_missing() -> str | None:
    """Return what torch.compile needs and this machine lacks ('needs …'), or ``None``."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return "needs a C++ compiler, and neither g++ nor clang++ was found"
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        return f"needs Python's headers (python3-dev), and {headers} has no Python.h"
    return None
