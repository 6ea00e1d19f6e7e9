"""Export a student's embedding as a program for machines without this package: ONNX and torch.export.

Shapes: B images, S pixels a side, D channels.
"""

import copy
import json
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2v_composer.models.alibi import Alibi
from d2v_composer.models.names import Pooling, Representation
from d2v_composer.models.student import Student
from d2v_composer.system.atomic_files import partial_file
from d2v_composer.system.errors import InputError

__all__ = ["OPSET", "Embedder", "export_onnx", "export_program"]

OPSET = 18


class FixedAlibi(Alibi):
    """ALiBi with its bias stored in the program, for one length."""

    bias: Tensor

    def __init__(self, alibi: Alibi, num_steps: int) -> None:
        super().__init__(
            alibi.distance,
            num_heads=alibi.num_heads,
            num_alibi_heads=alibi.num_alibi_heads,
            num_extra_tokens=alibi.num_extra_tokens,
        )
        self.register_buffer("bias", alibi.build(num_steps))

    def unscaled(self, num_steps: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.bias.to(dtype)


class Embedder(nn.Module):
    """A copy of a student that maps normalised images, (B, 3, S, S) float, to embeddings, (B, D) float32."""

    def __init__(self, student: Student, pooling: Pooling = "cls", representation: Representation = "output") -> None:
        super().__init__()
        self.student = copy.deepcopy(student).cpu().requires_grad_(False).eval()
        num_steps = student.encoder.config.num_steps
        for part in (self.student, self.student.encoder):
            part.alibi = None if part.alibi is None else FixedAlibi(part.alibi, num_steps)
        self.pooling: Pooling = pooling
        self.representation: Representation = representation

    def forward(self, images: Tensor) -> Tensor:
        return self.student.embed(images, self.pooling, self.representation)

    def example(self) -> Tensor:
        """Return a batch of two images; torch.export would treat a batch size of one as constant."""
        config = self.student.encoder.config
        return torch.zeros(2, config.in_chans, config.image_size, config.image_size)


def preprocessing(student: Student) -> dict[str, Any]:
    """Return the preprocessing of images that the program expects."""
    config = student.encoder.config
    wanted = ("image_size", "image_mean", "image_std")
    return {name: value for name, value in asdict(config).items() if name in wanted} | {"interpolation": "bicubic"}


def export_onnx(embedder: Embedder, path: Path) -> None:
    """Write ONNX, opset 18: ``images`` (batch, 3, S, S) float → ``embedding`` (batch, D); preprocessing as metadata.

    Raises:
        InputError: The packages ``onnx`` and ``onnxscript`` are not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise InputError(f"{path}: needs {' and '.join(missing)}: pip install 'd2v-composer[onnx]'")
    program = torch.onnx.export(
        trace(embedder),
        input_names=["images"],
        output_names=["embedding"],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # without a file name, torch returns the program
    program.model.metadata_props["preprocessing"] = json.dumps(preprocessing(embedder.student))
    with partial_file(path) as partial:
        program.save(partial)


def export_program(embedder: Embedder, path: Path) -> None:
    """Write a program for ``torch.export.load(path).module()``, with preprocessing.json in its extra files."""
    extra = {"preprocessing.json": json.dumps(preprocessing(embedder.student))}
    with partial_file(path) as partial, partial.open("wb") as file:  # torch warns of another suffix than .pt2
        torch.export.save(trace(embedder), file, extra_files=extra)


def trace(embedder: Embedder) -> torch.export.ExportedProgram:
    """Trace the program for any number of images."""
    images = embedder.example()
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    with torch.no_grad():
        return torch.export.export(embedder, (images,), dynamic_shapes={"images": {0: batch}}, strict=False)
