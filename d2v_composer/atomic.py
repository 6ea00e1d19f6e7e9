"""Local files that are there whole, or as they were."""

from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Write a file whose folder exists; a reader, and whoever comes after a kill, never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    partial.replace(path)
