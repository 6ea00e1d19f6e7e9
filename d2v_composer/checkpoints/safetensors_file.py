"""Our own model files: safetensors with sizes and provenance in the metadata.

One file is one whole model, and nothing in it can run. Metadata: ``format`` (what it is), ``format_version``,
``config`` and ``provenance``, the last two as JSON.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from d2v_composer.system.atomic_files import check_out_file, partial_file
from d2v_composer.system.errors import InputError
from d2v_composer.system.retry import reason

__all__ = ["Artifact", "is_safetensors", "parse_object", "read_artifact", "read_kind", "sha256", "write_artifact"]

Kind = Literal["teacher", "student"]
FORMAT_VERSION = 1
# Of sizes and provenance, in characters; ours have some thousands, and objects take 25 times as many bytes.
LARGEST_JSON = 4 << 20


class Artifact(NamedTuple):
    """The contents of one file."""

    config: dict[str, Any]
    provenance: dict[str, Any]
    tensors: dict[str, Tensor]


def write_artifact(path: Path, kind: Kind, artifact: Artifact) -> None:
    """Write a file that exists only once it is whole.

    Raises:
        InputError: There cannot be such a file.
    """
    metadata = {
        "format": f"d2v_composer.{kind}",
        "format_version": str(FORMAT_VERSION),
        "config": json.dumps(artifact.config),
        "provenance": json.dumps(artifact.provenance),
    }
    check_out_file(path)
    with partial_file(path) as partial:
        save_file({name: tensor.contiguous() for name, tensor in artifact.tensors.items()}, partial, metadata)


def read_artifact(path: Path, kind: Kind) -> Artifact:
    """Read a file of one kind.

    Raises:
        InputError: It is damaged, of another kind, or from a newer version of this package.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            return Artifact(parse_object(metadata["config"]), parse_object(metadata["provenance"]), tensors)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file ({reason(error)})") from error
    except (ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: unusable metadata ({reason(error)})") from error


def read_kind(path: Path) -> str:
    """What a file says it holds: ``teacher``, ``student``, or something else.

    Raises:
        InputError: It is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format", "none").removeprefix("d2v_composer.")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file ({reason(error)})") from error


def parse_object(text: str | bytes) -> dict[str, Any]:
    """A JSON object of a stranger's, within bounds of time and memory.

    Raises:
        ValueError: It is too long, nests too deep, names a key twice, has a number that JSON does not know, or is no
            object.
    """
    if len(text) > LARGEST_JSON:
        raise ValueError(f"has {len(text)} characters, at most {LARGEST_JSON} are read")
    try:
        content = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nests too deep") from error
    if not isinstance(content, dict):
        raise ValueError(f"is no object, but {type(content).__name__}")
    return content


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("names a key twice")
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"has the number {name}, which JSON does not know")


def _check_metadata(path: Path, metadata: dict[str, str], kind: Kind) -> None:
    found = metadata.get("format", "none")
    if found != f"d2v_composer.{kind}":
        raise InputError(f"{path}: its format is {_shown(found)}, expected d2v_composer.{kind}")
    version = metadata.get("format_version", "none")
    if version not in map(str, range(FORMAT_VERSION + 1)):
        raise InputError(f"{path}: format version {_shown(version)}, this package reads up to {FORMAT_VERSION}")


def _shown(text: str) -> str:
    """A stranger's word as it may stand in a line."""
    return text if text.isprintable() and len(text) < 50 else f"{text[:50]!r}"


def is_safetensors(path: Path) -> bool:
    """Whether a file starts like one: the length of a JSON header, then the header."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{"


def sha256(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
