"""Parts of work that machines share."""

from argparse import ArgumentTypeError
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from typing_extensions import Self

Item = TypeVar("Item")


class Part(NamedTuple):
    """One of several parts."""

    number: int
    """From 0."""
    count: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse I/N, as an argparse type."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count) <= 100_000):
            raise ArgumentTypeError(f"must be I/N with I from 0 to N - 1, got {text!r}")
        return cls(int(number), int(count))

    @property
    def name(self) -> str:
        return f"{self.number:05}-of-{self.count:05}"

    def of(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this part of a sequence."""
        first, end = (len(items) * number // self.count for number in (self.number, self.number + 1))
        return items[first:end]


ALL = Part(0, 1)
