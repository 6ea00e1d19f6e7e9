"""Show progress: a bar on a terminal, lines in a pipe or file."""

import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0
"""Seconds between two lines; shorter work prints none."""


def progress_bar(*iterable: Any, desc: str, unit: str, **options: Any) -> tqdm:
    """Return a tqdm bar that disappears when it is done; in a pipe or file, one that prints lines."""
    if sys.stderr.isatty():
        return tqdm(*iterable, desc=desc, unit=unit, leave=False, **options)
    quiet = {"delay": LINE_SECONDS, "mininterval": LINE_SECONDS, "leave": False, "ncols": 0}
    return _Lines(*iterable, desc=desc, unit=f" {unit}", **quiet, **options)


class _Lines(tqdm):
    """A bar that prints lines instead of overwriting one."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:
            print(" ".join(str(self).split()), file=self.fp, flush=True)  # tqdm pads the rate

    def clear(self, *_: Any, **__: Any) -> None:
        """Do nothing, so that printed lines stay."""
