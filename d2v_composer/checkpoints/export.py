"""Export a student's embedding as a program for machines without this package: ONNX and torch.export.

Shapes: B images, S pixels a side, D channels.
"""

import copy
import json
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from d2v_composer.checkpoints.headline import Headline
from d2v_composer.models.alibi import Alibi
from d2v_composer.models.sizes import height_and_width
from d2v_composer.models.student import Student
from d2v_composer.system.atomic_files import out_file
from d2v_composer.system.errors import InputError
from d2v_composer.system.packages import install_command

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
    """A copy of a student that maps normalised images, (B, 3, S, S) float, to embeddings, (B, D) float32.

    Args:
        student: Copied.
        headline: The embedding.
    """

    def __init__(self, student: Student, headline: Headline) -> None:
        super().__init__()
        self.student = copy.deepcopy(student).cpu().requires_grad_(False).eval()
        num_steps = student.encoder.config.num_steps
        for part in (self.student, self.student.encoder):
            part.alibi = None if part.alibi is None else FixedAlibi(part.alibi, num_steps)
        self.headline = headline

    def forward(self, images: Tensor) -> Tensor:
        return self.student.embed(images, self.headline.pooling, self.headline.representation)

    def example(self) -> Tensor:
        """Return a batch of two images; torch.export would treat a batch size of one as constant."""
        config = self.student.encoder.config
        return torch.zeros(2, config.in_chans, *height_and_width(config.image_size))


def describe(embedder: Embedder) -> dict[str, str]:
    """Return the preprocessing of images that the program expects, as JSON, and the name of the embedding."""
    config = embedder.student.encoder.config
    names = ("image_size", "image_mean", "image_std", "interpolation")
    preprocessing = {name: getattr(config, name) for name in names}
    return {"preprocessing": json.dumps(preprocessing), "embedding": embedder.headline.name}


def export_onnx(embedder: Embedder, path: Path) -> None:
    """Write ONNX, opset 18: ``images`` (batch, 3, S, S) float → ``embedding`` (batch, D).

    The metadata are ``preprocessing`` and ``embedding`` of :func:`describe`.

    Raises:
        InputError: The packages ``onnx`` and ``onnxscript`` are not installed, or the disk is full.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise InputError(f"{path}: needs {' and '.join(missing)}: {install_command('onnx', *missing)}")
    program = torch.onnx.export(
        trace(embedder),
        input_names=["images"],
        output_names=["embedding"],
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    assert program is not None  # without a file name, torch returns the program
    program.model.metadata_props.update(describe(embedder))
    with out_file(path) as partial:
        program.save(partial)


def export_program(embedder: Embedder, path: Path) -> None:
    """Write a program for ``torch.export.load(path).module()``; :func:`describe` as extra files.

    Raises:
        InputError: The disk is full.
    """
    description = describe(embedder)
    extra = {"preprocessing.json": description["preprocessing"], "embedding": description["embedding"]}
    program = trace(embedder)
    with out_file(path) as partial, partial.open("wb") as file:  # torch warns of another suffix than .pt2
        torch.export.save(program, file, extra_files=extra)


def trace(embedder: Embedder) -> torch.export.ExportedProgram:
    """Trace the program for any number of images."""
    images = embedder.example()
    batch = torch.export.Dim("batch", min=1, max=1 << 16)
    with torch.no_grad():
        return torch.export.export(embedder, (images,), dynamic_shapes={"images": {0: batch}}, strict=False)
