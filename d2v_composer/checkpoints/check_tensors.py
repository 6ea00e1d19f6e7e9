"""Compare the tensors of a file with those that a model of its sizes has."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from d2v_composer.models.data2vec2 import Data2Vec2, Data2Vec2Config
from d2v_composer.system.errors import InputError

__all__ = ["FLOATS", "check_num_blocks", "check_tensors", "expected_shapes"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def expected_shapes(config: Data2Vec2Config) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of a teacher, without allocating one."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Data2Vec2(config).state_dict().items()}


def check_num_blocks(source: Any, num_blocks: int, tensors: Mapping[str, Tensor]) -> None:
    """Refuse more blocks than there can be in a file; even without weights a thousand take seconds to lay out.

    Raises:
        InputError: It says how many.
    """
    if num_blocks > len(tensors):
        raise InputError(f"{source}: unusable sizes: {num_blocks} blocks for {len(tensors)} tensors")


def check_tensors(
    source: Any, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], their_name: Any = str
) -> None:
    """Refuse tensors that are missing, unknown, of another shape, or not finite.

    Args:
        source: Named in the error.
        expected: Name → shape.
        tensors: Name → what the file holds.
        their_name: Our name → the file's.

    Raises:
        InputError: It names the first such tensor, with both shapes.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{source}: tensor {their_name(name)} {shape} is missing")
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise InputError(
                f"{source}: tensor {their_name(name)} has shape {tuple(tensor.shape)}, the sizes ask for {shape}"
            )
        if tensor.layout != torch.strided or tensor.dtype not in FLOATS or tensor.is_meta:
            raise InputError(f"{source}: tensor {their_name(name)} holds no plain floating-point numbers")
        if not tensor.isfinite().all():
            raise InputError(f"{source}: tensor {their_name(name)} has values that are not finite")
    unknown = [their_name(name) for name in tensors if name not in expected]
    if unknown:
        found = tuple(tensors[next(name for name in tensors if name not in expected)].shape)
        raise InputError(f"{source}: {len(unknown)} tensor(s) that no image teacher has, first {unknown[0]} {found}")
