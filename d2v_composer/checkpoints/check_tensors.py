"""Compare a file's tensors with those of a model of its sizes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2v_composer.models.data2vec2 import Data2Vec2, Data2Vec2Config
from d2v_composer.system.errors import InputError

__all__ = ["FLOATS", "check_num_blocks", "check_same_encoder", "check_teacher", "check_tensors", "shapes_of"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# BatchNorm's number of batches, a whole number.
COUNTER = "num_batches_tracked"
# A file of a teacher may hold float16 or bfloat16 numbers.
ROUNDING = 0.01


def shapes_of(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    """Return name → shape of a module's tensors, without allocating them."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}


def check_teacher(
    source: Any, config: Data2Vec2Config, tensors: Mapping[str, Tensor], their_name: Callable[[str], str] = str
) -> None:
    """Check a teacher's tensors against its sizes, as :func:`check_tensors`."""
    check_num_blocks(source, config.prenet_depth + config.depth, tensors)
    check_tensors(source, shapes_of(lambda: Data2Vec2(config)), tensors, their_name)


def check_num_blocks(source: Any, num_blocks: int, tensors: Mapping[str, Tensor]) -> None:
    """Check that a file can hold so many blocks; building a thousand takes seconds even without weights.

    Raises:
        InputError: It has fewer tensors.
    """
    if num_blocks > len(tensors):
        raise InputError(f"{source}: unusable sizes: {num_blocks} blocks for {len(tensors)} tensors")


def check_tensors(
    source: Any,
    expected: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    their_name: Callable[[str], str] = str,
) -> None:
    """Check that exactly the expected tensors exist, with their shapes and finite floating-point values.

    Args:
        source: Named in the error.
        expected: Name → shape.
        tensors: Name → tensor of the file.
        their_name: Our name → the file's.

    Raises:
        InputError: Names the first tensor at fault.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise InputError(f"{source}: tensor {their_name(name)} {shape} is missing")
        tensor, label = tensors[name], f"{source}: tensor {their_name(name)}"
        if tuple(tensor.shape) != shape:
            raise InputError(f"{label} has shape {tuple(tensor.shape)}, the sizes ask for {shape}")
        if tensor.layout != torch.strided or tensor.is_meta or not (tensor.dtype in FLOATS or name.endswith(COUNTER)):
            raise InputError(f"{label} is not a dense floating-point tensor")
        if not tensor.isfinite().all():
            raise InputError(f"{label} has values that are not finite")
    unknown = [name for name in tensors if name not in expected]
    if unknown:
        first = f"{their_name(unknown[0])} {tuple(tensors[unknown[0]].shape)}"
        raise InputError(f"{source}: {len(unknown)} unknown tensor(s), first {first}")


def check_same_encoder(source: Any, found: nn.Module, expected: nn.Module) -> None:
    """Check that a teacher has the encoder of a student, up to the rounding of its file.

    Raises:
        InputError: Names the first tensor that differs.
    """
    theirs, ours = found.state_dict(), expected.state_dict()
    for name, tensor in ours.items():
        is_same_shape = name in theirs and theirs[name].shape == tensor.shape
        largest = tensor.abs().max()
        if not is_same_shape or (theirs[name] - tensor).abs().max() > ROUNDING * largest:
            raise InputError(f"{source}: is not the student's teacher: its encoder has another {name}")
