"""Our own model files: safetensors with sizes and provenance in the metadata.

One file is one whole model, and nothing in it can run. Metadata: ``format`` (what it is), ``format_version``,
``config`` and ``provenance``, the last two as JSON.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from d2v_composer.errors import InputError

__all__ = ["Artifact", "is_safetensors", "read_artifact", "read_kind", "sha256", "write_artifact"]

Kind = Literal["teacher", "student"]
FORMAT_VERSION = 1


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
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file({name: tensor.contiguous() for name, tensor in artifact.tensors.items()}, partial, metadata)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


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
            return Artifact(_json_object(metadata, "config"), _json_object(metadata, "provenance"), tensors)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file ({str(error).splitlines()[0]})") from error
    except (ValueError, KeyError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: unusable metadata ({type(error).__name__})") from error


def read_kind(path: Path) -> str:
    """What a file says it holds: ``teacher``, ``student``, or something else.

    Raises:
        InputError: It is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format", "none").removeprefix("d2v_composer.")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file ({str(error).splitlines()[0]})") from error


def _json_object(metadata: dict[str, str], name: str) -> dict[str, Any]:
    content = json.loads(metadata[name])
    if not isinstance(content, dict):
        raise ValueError(f"{name} is no object")
    return content


def _check_metadata(path: Path, metadata: dict[str, str], kind: Kind) -> None:
    found = metadata.get("format", "none")
    if found != f"d2v_composer.{kind}":
        raise InputError(f"{path}: its format is {found}, expected d2v_composer.{kind}")
    version = metadata.get("format_version", "")
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise InputError(f"{path}: format version {version or 'none'}, this package reads up to {FORMAT_VERSION}")


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
