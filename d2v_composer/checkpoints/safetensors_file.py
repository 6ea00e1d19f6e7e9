"""Our own model files: safetensors with sizes and provenance in the metadata.

A file holds one whole model, and no code. Metadata: ``format``, ``format_version``, and JSON in ``config`` and
``provenance``.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from d2v_composer.system.atomic_files import check_out_file, out_file
from d2v_composer.system.errors import InputError
from d2v_composer.system.retry import reason

__all__ = [
    "LARGEST_JSON",
    "ModelFile",
    "is_safetensors",
    "parse_object",
    "read_kind",
    "read_model_file",
    "read_tensors",
    "sha256",
    "write_model_file",
]

Kind = Literal["teacher", "student", "classifier"]
# A student of version 2 names its headline in its tensor config_json, which readers of version 1 would refuse.
FORMAT_VERSIONS: dict[Kind, int] = {"teacher": 1, "student": 2, "classifier": 1}
READ_BY: dict[str, str] = {
    "teacher": "a teacher, read by load_teacher",
    "student": "an exported student, read by load_student",
    "classifier": "a fine-tuned classifier, read by timm as d2v2_student",
}
# Characters of sizes or provenance. Ours have some thousands; parsed, they take 25 times as many bytes.
LARGEST_JSON = 4 << 20


class ModelFile(NamedTuple):
    """Contents of a file."""

    config: dict[str, Any]
    provenance: dict[str, Any]
    tensors: dict[str, Tensor]


def write_model_file(path: Path, kind: Kind, content: ModelFile) -> None:
    """Write a complete file, or leave ``path`` as it was.

    Raises:
        InputError: The path cannot be written.
    """
    metadata = {
        "format": f"d2v_composer.{kind}",
        "format_version": str(FORMAT_VERSIONS[kind]),
        "config": json.dumps(content.config),
        "provenance": json.dumps(content.provenance),
    }
    check_out_file(path)
    tensors = {name: tensor.contiguous() for name, tensor in content.tensors.items()}
    with out_file(path) as partial:
        try:
            save_file(tensors, partial, metadata)
        except SafetensorError as error:  # of the disk
            raise OSError(reason(error)) from error


def read_model_file(path: Path, kind: Kind) -> ModelFile:
    """Read a file of one kind.

    Raises:
        InputError: It is corrupt, of another kind, or from a newer version of this package.
    """
    try:
        with _open(path) as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        return ModelFile(parse_object(metadata["config"]), parse_object(metadata["provenance"]), tensors)
    except InputError:
        raise
    except (ValueError, KeyError) as error:
        raise InputError(f"{path}: unusable metadata ({reason(error)})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of any file.

    Raises:
        InputError: It is corrupt.
    """
    with _open(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)


def read_kind(path: Path) -> str:
    """Return the kind of model in a file, such as ``teacher`` or ``student``.

    Raises:
        InputError: It is corrupt.
    """
    with _open(path) as file:
        return (file.metadata() or {}).get("format", "none").removeprefix("d2v_composer.")


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated, or not a safetensors file ({reason(error)})") from error
    except AttributeError as error:  # a number format of a newer torch
        raise InputError(f"{path}: holds numbers of a kind that torch {torch.__version__} lacks ({error})") from error


def _check_metadata(path: Path, metadata: dict[str, str], kind: Kind) -> None:
    found = metadata.get("format", "none")
    if found != f"d2v_composer.{kind}":
        other = READ_BY.get(found.removeprefix("d2v_composer."))
        raise InputError(
            f"{path}: {f'is {other}' if other else f'its format is {_shown(found)}'}; expected d2v_composer.{kind}"
        )
    version, newest = metadata.get("format_version", "none"), FORMAT_VERSIONS[kind]
    if version not in map(str, range(newest + 1)):
        raise InputError(f"{path}: format version {_shown(version)}, this package reads up to {newest}")


def _shown(text: str) -> str:
    return text if text.isprintable() and len(text) < 50 else f"{text[:50]!r}"


def parse_object(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object from any source, within limits of time and memory.

    Raises:
        ValueError: It is too long or too deep, repeats a key, has NaN or Infinity, or is not an object.
    """
    if len(text) > LARGEST_JSON:
        raise ValueError(f"has {len(text)} characters, at most {LARGEST_JSON} are read")
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ValueError("nests too deep") from error
    if not isinstance(content, dict):
        raise ValueError(f"must be an object, got {type(content).__name__}")
    return content


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("repeats a key")
    return content


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"has the number {name}, which JSON does not allow")


def is_safetensors(path: Path) -> bool:
    """Return whether a file begins like a safetensors file: the length of a JSON header, then the header."""
    with path.open("rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{"


def sha256(path: Path) -> str:
    """Return the hash of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
