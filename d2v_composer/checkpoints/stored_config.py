"""The sizes that a stranger's file gives, checked with its tensors before anything is made of either.

No shape is believed: a model of the sizes is laid out without memory, and must be the one that the file holds.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from d2v_composer.checkpoints.check_tensors import check_num_blocks, check_tensors
from d2v_composer.checkpoints.safetensors_file import LARGEST_JSON, parse_object
from d2v_composer.models.data2vec2 import Data2Vec2Config
from d2v_composer.models.image_encoder import ImageEncoder, ImageEncoderConfig
from d2v_composer.models.student import Student, StudentConfig
from d2v_composer.system.errors import InputError
from d2v_composer.system.retry import reason

__all__ = ["CONFIG_TENSOR", "check_student", "config_tensor", "parse_config_tensor", "read_config", "shapes_of"]

CONFIG_TENSOR = "config_json"
ConfigT = TypeVar("ConfigT", Data2Vec2Config, ImageEncoderConfig, StudentConfig)


def config_tensor(encoder: ImageEncoderConfig, student: StudentConfig) -> torch.Tensor:
    """A student's sizes as bytes of JSON, (any,) uint8, for readers that get nothing but the tensors of a file."""
    text = json.dumps({"encoder": asdict(encoder), "student": asdict(student)})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def parse_config_tensor(stored: torch.Tensor) -> dict[str, Any]:
    """Back from :func:`config_tensor`; the sizes are not checked yet.

    Raises:
        ValueError: It is none.
    """
    if stored.dtype != torch.uint8 or stored.ndim != 1 or len(stored) > LARGEST_JSON:
        raise ValueError(f"is {stored.dtype} {tuple(stored.shape)}, expected at most {LARGEST_JSON} bytes")
    return parse_object(stored.cpu().numpy().tobytes())


def check_student(
    source: Any, sizes: dict[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[ImageEncoderConfig, StudentConfig]:
    """Read an exported student's sizes and hold its tensors against them, before anything is made of either.

    Every way into such a file goes through here.

    Args:
        source: Named in the error.
        sizes: What the file says of encoder and student.
        tensors: Name → what the file holds.

    Raises:
        InputError: The sizes are none, or the tensors are missing, unknown, of other shapes, not plain floating-point
            numbers, or not finite.
    """
    _check_names(source, sizes, ("encoder", "student"))
    encoder_config = read_config(source, ImageEncoderConfig, sizes["encoder"])
    student_config = read_config(source, StudentConfig, sizes["student"])
    check_num_blocks(source, encoder_config.prenet_depth + student_config.depth, tensors)
    try:
        with torch.device("meta"):
            shapes = shapes_of(Student(ImageEncoder(encoder_config), student_config))
    except ValueError as error:
        raise InputError(f"{source}: unusable sizes in its metadata: {error}") from error
    check_tensors(source, shapes, tensors)
    return encoder_config, student_config


def _check_names(source: Any, fields: Any, names: Iterable[str]) -> None:
    """Refuse what is no JSON object of these names.

    Raises:
        InputError: It says which is missing or unknown.
    """
    if not isinstance(fields, dict):
        raise InputError(
            f"{source}: unusable sizes in its metadata: expected them by name, got {type(fields).__name__}"
        )
    expected = set(names)
    missing, unknown = expected - fields.keys(), fields.keys() - expected
    if missing or unknown:
        problem = f"{min(missing)} is missing" if missing else f"there is no {min(unknown)[:50]!r}"
        raise InputError(f"{source}: unusable sizes in its metadata: {problem}")


def read_config(source: Any, config_class: type[ConfigT], fields: Any) -> ConfigT:
    """A config from a file's JSON, in which tuples are lists; all its fields must be there.

    Raises:
        InputError: It says which field is missing, unknown or out of range.
    """
    _check_names(source, fields, (field.name for field in dataclasses.fields(config_class)))
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: unusable sizes in its metadata: {reason(error)[:200]}") from error


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of a module's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
