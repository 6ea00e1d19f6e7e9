"""Command lines: their parser, and types of arguments that need heavy modules only when they are given."""

import argparse

__all__ = ["make_parser", "size"]


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose ``--help`` shows a command's docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def size(text: str) -> int:
    """Return a number of bytes, such as 60gb, as Streaming reads it."""
    from streaming.base.util import bytes_to_int  # takes seconds

    try:
        return bytes_to_int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be bytes or a size such as '60gb', got {text!r}") from error
