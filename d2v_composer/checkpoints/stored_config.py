"""Check the sizes in a file, and its tensors against them, before building a model.

The model is laid out on the meta device, without memory, and must have exactly the file's tensors.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from d2v_composer.checkpoints.check_tensors import check_num_blocks, check_tensors, shapes_of
from d2v_composer.checkpoints.headline import DEFAULT_HEADLINE, Headline, parse_headline
from d2v_composer.checkpoints.safetensors_file import LARGEST_JSON, parse_object
from d2v_composer.models.data2vec2 import Data2Vec2Config
from d2v_composer.models.encoder import Encoder
from d2v_composer.models.image_encoder import ImageEncoder, ImageEncoderConfig
from d2v_composer.models.student import Student, StudentConfig
from d2v_composer.models.timm_config import TimmEncoderConfig
from d2v_composer.system.errors import InputError
from d2v_composer.system.retry import reason

__all__ = [
    "CONFIG_TENSOR",
    "StoredEncoderConfig",
    "StoredSizes",
    "add_outputs",
    "build_encoder",
    "check_student",
    "config_tensor",
    "parse_config_tensor",
    "read_config",
    "sizes_of",
]

CONFIG_TENSOR = "config_json"
ENCODER = "encoder."
# Of the norm: above the rounding of another machine, below that of bfloat16, in which students train.
OUTPUT_TOLERANCE = 1e-3
ConfigT = TypeVar("ConfigT", Data2Vec2Config, ImageEncoderConfig, StudentConfig, TimmEncoderConfig)
StoredEncoderConfig = ImageEncoderConfig | TimmEncoderConfig


class StoredSizes(NamedTuple):
    """The contents of a tensor of :func:`config_tensor`."""

    sizes: dict[str, Any]
    """Those of ``encoder`` and ``student``, not checked."""
    headline: Headline
    """The default in a file of version 0.1.0, which has none."""


def build_encoder(config: StoredEncoderConfig) -> Encoder:
    """Build an encoder of any kind, frozen, to load a state dict into."""
    return encoder_class(config)(config).freeze()


def encoder_class(config: StoredEncoderConfig) -> type[Any]:
    """Return the class of an encoder."""
    if isinstance(config, ImageEncoderConfig):
        return ImageEncoder
    from d2v_composer.models.timm_encoder import TimmEncoder  # timm takes seconds to import

    return TimmEncoder


def add_outputs(config: StoredEncoderConfig, tensors: Mapping[str, Tensor]) -> StoredEncoderConfig:
    """Return the config of a timm encoder with what it computes, for its readers; others as they are.

    Args:
        config: The encoder's.
        tensors: Its state dict.
    """
    if not isinstance(config, TimmEncoderConfig) or config.outputs:
        return config
    from timm import __version__ as now

    return dataclasses.replace(config, timm=now, outputs=compute_outputs(config, tensors))


def compute_outputs(config: TimmEncoderConfig, tensors: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Return a few numbers of what an encoder with these tensors computes, wherever they lie and in any dtype."""
    with torch.device("cpu"):
        encoder: Any = build_encoder(config).float()
        encoder.load_state_dict(tensors)
        return encoder.sample_outputs()


def check_outputs(source: Any, config: StoredEncoderConfig, tensors: Mapping[str, Tensor]) -> None:
    """Check that a timm encoder computes what it did at its export, if that was with another version of timm.

    Raises:
        InputError: It computes something else.
    """
    if not isinstance(config, TimmEncoderConfig) or not config.outputs:
        return
    from timm import __version__ as now

    if config.timm == now:
        return
    expected, found = torch.tensor(config.outputs), torch.tensor(compute_outputs(config, tensors))
    if not (found - expected).norm() <= OUTPUT_TOLERANCE * expected.norm():  # NaN is refused too
        raise InputError(
            f"{source}: timm {now} computes something else for {config.model} than timm {config.timm}, with which it "
            f"was exported: pip install timm=={config.timm}"
        )


def sizes_of(student: Student) -> dict[str, Any]:
    """Return a student's sizes and its encoder's."""
    encoder: Any = student.encoder.config
    return {"encoder": asdict(encoder), "student": asdict(student.config)}


def config_tensor(sizes: dict[str, Any], headline: Headline) -> Tensor:
    """Return a student's sizes and headline as JSON bytes, uint8, for readers that only get a file's tensors."""
    content = sizes | {"headline": headline._asdict()}
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def parse_config_tensor(stored: Tensor) -> StoredSizes:
    """Return the contents of a tensor of :func:`config_tensor`.

    Raises:
        ValueError: The tensor does not hold a JSON object, or its headline is unknown.
    """
    if stored.dtype != torch.uint8 or stored.ndim != 1 or len(stored) > LARGEST_JSON:
        raise ValueError(f"is {stored.dtype} {tuple(stored.shape)}, expected at most {LARGEST_JSON} bytes")
    sizes = parse_object(stored.cpu().numpy().tobytes())
    headline = parse_headline(sizes.pop("headline")) if "headline" in sizes else DEFAULT_HEADLINE
    return StoredSizes(sizes, headline)


def check_student(
    source: Any, sizes: dict[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[StoredEncoderConfig, StudentConfig]:
    """Check an exported student's sizes and tensors. Every reader of such a file calls this first.

    Args:
        source: Named in the error.
        sizes: Those of ``encoder`` and ``student``, from the file.
        tensors: Name → tensor of the file.

    Raises:
        InputError: A size is unusable; a tensor is missing, unknown, misshapen or not finite; or this version of timm
            computes something else.
    """
    _check_names(source, sizes, ("encoder", "student"))
    is_timm = isinstance(sizes["encoder"], dict) and "model" in sizes["encoder"]
    config_class: type[Any] = TimmEncoderConfig if is_timm else ImageEncoderConfig
    encoder_config = read_config(source, config_class, sizes["encoder"])
    student_config = read_config(source, StudentConfig, with_normalisation(sizes["student"]))
    check_num_blocks(source, encoder_config.prenet_depth + student_config.depth, tensors)
    kind = encoder_class(encoder_config)  # imports torch._dynamo, which fails on shapes_of's device
    try:
        shapes = shapes_of(lambda: Student(kind(encoder_config), student_config))
    except ValueError as error:
        raise InputError(f"{source}: unusable sizes in its metadata: {error}") from error
    check_tensors(source, shapes, tensors)
    encoder = {name.removeprefix(ENCODER): each for name, each in tensors.items() if name.startswith(ENCODER)}
    check_outputs(source, encoder_config, encoder)
    return encoder_config, student_config


def with_normalisation(fields: Any) -> Any:
    """Add to a student's sizes what those of older files leave out, which knew only InstanceNorm."""
    return {"normalisation": "instance"} | fields if isinstance(fields, dict) else fields


def read_config(source: Any, config_class: type[ConfigT], fields: Any) -> ConfigT:
    """Build a config from a file's JSON, in which tuples are lists; every field is required.

    Raises:
        InputError: A field is missing, unknown or out of range.
    """
    _check_names(source, fields, (field.name for field in dataclasses.fields(config_class)))
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()
    }
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{source}: unusable sizes in its metadata: {reason(error)[:200]}") from error


def _check_names(source: Any, fields: Any, names: Iterable[str]) -> None:
    unusable = f"{source}: unusable sizes in its metadata"
    if not isinstance(fields, dict):
        raise InputError(f"{unusable}: must be an object, got {type(fields).__name__}")
    expected = set(names)
    missing, unknown = expected - fields.keys(), fields.keys() - expected
    if missing or unknown:
        fault = f"{min(missing)} is missing" if missing else f"unknown key {min(unknown)[:50]!r}"
        raise InputError(f"{unusable}: {fault}")
