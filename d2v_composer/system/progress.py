"""Show the progress of long work: a bar on a terminal, elsewhere a line now and then."""

import sys
from typing import Any

from tqdm import tqdm

__all__ = ["LINE_SECONDS", "progress_bar"]

LINE_SECONDS = 10.0
"""Time between two lines; shorter work prints none."""
LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_noinv_fmt}, left {remaining}"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}{unit}, {rate_noinv_fmt}"


def progress_bar(*iterable: Any, desc: str, unit: str, **options: Any) -> tqdm:
    """Return tqdm's bar, which disappears at its end; in a pipe or file, one that prints lines.

    Args:
        iterable: As tqdm's, at most one.
        desc: What is done, and to what.
        unit: What is counted.
        options: Other arguments of tqdm.
    """
    if sys.stderr.isatty():
        return tqdm(*iterable, desc=desc, unit=unit, leave=False, **options)
    quiet = {"delay": LINE_SECONDS, "mininterval": LINE_SECONDS, "leave": False}
    return _Lines(*iterable, desc=desc, unit=f" {unit}", **quiet, **options)


class _Lines(tqdm):
    """A bar that prints lines instead of overwriting one."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:
            self.bar_format = LINE if self.total else LINE_WITHOUT_TOTAL
            print(" ".join(str(self).split()), file=self.fp, flush=True)  # tqdm pads the rate

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Print nothing between two lines."""

    def clear(self, *_: Any, **__: Any) -> None:
        """Leave what is printed."""
