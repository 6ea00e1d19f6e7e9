"""Read the samples of a labelled MDS data set, and the names of its classes."""

import json
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d2v_composer.data.mds_index import SUMMARY, keep_encoded
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError
from d2v_composer.system.fetch import download_existing
from d2v_composer.system.retry import is_lasting, reason

if TYPE_CHECKING:
    from streaming.base.format.mds import MDSReader

__all__ = ["evenly_spaced", "fetch_class_names", "mds_class_names", "read_samples", "whole_label"]


def evenly_spaced(total: int, most: int | None) -> Sequence[int]:
    """Return at most ``most`` of the numbers below ``total``, evenly spaced; ``None``: all."""
    if most is None or most >= total:
        return range(total)
    return [number * total // most for number in range(most)]


def read_samples(
    folder: Path, shards: Sequence[dict[str, Any]], column: str, chosen: Sequence[int]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield samples of a data set with their numbers; shards of which none is wanted are not read.

    Args:
        folder: The data set's.
        shards: As :func:`read_image_index` returns them.
        column: The column of images; they stay encoded.
        chosen: The numbers of the samples, ascending.

    Raises:
        InputError: A shard cannot be read.
    """
    first = 0
    for shard in shards:
        end = first + shard["samples"]
        inside = range(bisect_left(chosen, first), bisect_left(chosen, end))
        if inside:
            reader = _open_shard(folder, shard, column)
            for number in map(chosen.__getitem__, inside):
                yield number, _read_sample(reader, number - first, folder / shard["raw_data"]["basename"])
        first = end


def _open_shard(folder: Path, shard: dict[str, Any], column: str) -> "MDSReader":
    from streaming.base.format.mds import MDSReader  # takes seconds

    reader = MDSReader.from_json(str(folder), None, shard)
    keep_encoded([reader], column)
    return reader


def _read_sample(reader: "MDSReader", place: int, path: Path) -> dict[str, Any]:
    try:
        return reader[place]
    except OSError as error:
        raise InputError(f"{path}: the shard cannot be read ({reason(error)})") from error
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the shard is corrupt ({reason(error)})") from error


def whole_label(value: Any) -> int:
    """Return a label as a number.

    Raises:
        ValueError: It is no whole number; likewise TypeError.
    """
    label = int(value)
    if not isinstance(value, str) and label != value:
        raise ValueError(f"{value} is none")
    return label


def mds_class_names(folder: Path) -> tuple[str, ...]:
    """Return the names that recipes/convert_imagenet.py wrote next to the index, if it did."""
    try:
        return tuple(json.loads((folder / SUMMARY).read_bytes())["classes"] or ())
    except FileNotFoundError:
        return ()
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / SUMMARY}: corrupt ({type(error).__name__})") from error


def fetch_class_names(remote: str, local: Path, patience: float) -> None:
    """Fetch the names of a remote data set's classes next to its index, if they are not here and it has any.

    Args:
        remote: The data set's address.
        local: Its cache, which holds its index.
        patience: Time for which an unreachable store is asked again, in seconds.

    Raises:
        InputError: The store is unreachable.
    """
    if (local / SUMMARY).exists():
        return
    address = f"{remote.rstrip('/')}/{SUMMARY}"
    try:
        download_existing(address, local / SUMMARY, patience)
    except Exception as error:
        if not is_lasting(error):  # some stores deny what they do not have
            raise InputError(f"{hide_secrets(address)}: cannot be fetched ({reason(error)})") from error
