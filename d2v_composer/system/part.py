"""Parts of work that is shared among machines."""

from argparse import ArgumentTypeError
from typing import Any, NamedTuple

from typing_extensions import Self


class Part(NamedTuple):
    """One of several parts."""

    number: int
    """From 0."""
    total: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse I/N, as an argparse type."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count) <= 100_000):
            raise ArgumentTypeError(f"must be I/N with I from 0 to N - 1, got {text!r}")
        return cls(int(number), int(count))

    @property
    def name(self) -> str:
        return f"{self.number:05}-of-{self.total:05}"

    def of(self, items: list[Any]) -> list[Any]:
        """Return this part of a list."""
        first, end = (len(items) * number // self.total for number in (self.number, self.number + 1))
        return items[first:end]


ALL = Part(0, 1)
