"""Show progress: a bar on a terminal, lines in a pipe or file."""

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")
LINE_SECONDS = 10.0
"""Seconds before the first line, and between two lines."""


def progress_bar(*iterable: Iterable[T], desc: str, unit: str, **options: Any) -> "tqdm[T]":
    """Return a tqdm bar that disappears when it is done; if stderr is not a terminal, the bar prints lines instead."""
    if sys.stderr.isatty():
        return tqdm(*iterable, desc=desc, unit=unit, leave=False, **options)
    return Lines(*iterable, desc=desc, unit=f" {unit}", ncols=0, **options)


class Lines(tqdm):
    """A progress bar that prints a new line every ``LINE_SECONDS`` instead of overwriting its line."""

    def __init__(self, *iterable: Any, **options: Any) -> None:
        pace = {"delay": LINE_SECONDS, "mininterval": LINE_SECONDS, "miniters": 1}
        super().__init__(*iterable, leave=False, **pace, **options)
        # Else tqdm.write would print its line again.
        self._instances.discard(self)  # pyright: ignore[reportAttributeAccessIssue]: the stub lacks it

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:  # tqdm's own format pads the rate
            print(str(self) if self.bar_format else " ".join(str(self).split()), file=self.fp, flush=True)

    def clear(self, *_: object, **__: object) -> None:
        """Do nothing, so that printed lines stay."""
