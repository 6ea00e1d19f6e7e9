"""Export a student to ONNX or torch.export."""

import copy
import io
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from d2v_composer.models.attention import Alibi
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.precision import is_equal_but_for_rounding
from d2v_composer.system.errors import InputError, errors_of
from d2v_composer.system.files import out_file

OPSET = 18
MAX_ONNX = 2_000_000_000  # bytes of weights in a file


def build_bias(alibi: Any, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Compute the result of :meth:`Alibi.unscaled`, (1, H, T, T), without a tensor that is kept between calls."""
    return alibi.build(num_tokens, alibi.slopes_of_heads).to(dtype)


class Program(nn.Module):
    """A copy of a student that maps inputs to embeddings, (B, D) float32, to be traced.

    Inputs are normalized images, (B, 3, height, width) float; or waveforms of one length, (B, L) float in [-1, 1] at
    16 kHz.

    Args:
        student: The student, which is copied.
        embedding: Name of the embedding that the program computes.
        takes_pixels: Take images as pixels, (B, height, width, 3) uint8, which the program normalizes.
    """

    def __init__(self, student: Backbone, embedding: str, takes_pixels: bool = False) -> None:
        super().__init__()
        self.original = student.embed_all
        self.student = copy.deepcopy(student).cpu().requires_grad_(False).eval()
        for alibi in self.modules():
            if isinstance(alibi, Alibi):  # the program needs any number of tokens and any device
                alibi.register_buffer("slopes_of_heads", alibi.slopes())
                alibi.unscaled = partial(build_bias, alibi)
        self.embedding = embedding
        self.takes_pixels = takes_pixels

    def example(self, count: int) -> Tensor:
        """Return ``count`` inputs of zeros, in the shape and dtype that the program takes."""
        inputs = self.student.encoder.example(count)
        return inputs.movedim(1, -1).to(torch.uint8).contiguous() if self.takes_pixels else inputs

    def forward(self, inputs: Tensor) -> Tensor:
        return self.compute(self.student.embed_all, inputs)

    def compute(self, embed_all: Callable[..., dict[str, Tensor]], inputs: Tensor) -> Tensor:
        """Compute the program's embedding with ``embed_all``, a method of a student."""
        return embed_all(inputs.movedim(-1, 1) if self.takes_pixels else inputs)[self.embedding]


def export_program(program: Program, path: Path) -> None:
    """Write a program to an .onnx or .pt2 file, and check with one input that the file computes the same embedding."""
    metadata = metadata_of(program)
    with out_file(path) as partial, errors_of(str(path), InputError):
        write, run = (write_onnx, run_onnx) if path.suffix == ".onnx" else (write_archive, run_archive)
        write(program, partial, metadata)
        inputs = program.example(1)
        inputs = torch.randint_like(inputs, 256) if program.takes_pixels else torch.randn_like(inputs)
        if not is_equal_but_for_rounding(run(partial, inputs), program.compute(program.original, inputs)):
            raise InputError("the exported model's embeddings differ from the student's, so the file was not written")


def metadata_of(program: Program) -> dict[str, str]:
    """Return what an exported file says of itself: ``preprocessing``, as JSON, and ``embedding``, a name."""
    config = program.student.encoder.config
    preprocessing = {name: getattr(config, name) for name in config.preprocessing}
    if program.takes_pixels:
        del preprocessing["image_mean"], preprocessing["image_std"]
        preprocessing["inputs"] = "uint8, (B, H, W, channels)"
    return {"preprocessing": json.dumps(preprocessing), "embedding": program.embedding}


def write_onnx(program: Program, path: Path, metadata: dict[str, str]) -> None:
    """Write a program as ONNX, with the input ``images`` or ``waveforms`` and the output ``embedding``, (batch, D)."""
    import onnx

    if (size := sum(tensor.nbytes for tensor in program.state_dict().values())) > MAX_ONNX:
        raise InputError(
            f"an ONNX file holds at most 2 GB, but this student's weights take {size / 1e9:.1f} GB; export to .pt2"
        )
    encoder = program.student.encoder
    with warnings.catch_warnings():  # torch 2.13 warns of its own LeafSpec
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
        traced = torch.onnx.export(
            trace(program),
            input_names=[encoder.input_name],
            output_names=["embedding"],
            dynamic_shapes={"inputs": {axis: name for axis, (name, *_) in encoder.free_axes.items()}},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert traced is not None  # without a file name, torch returns the program
    traced.model.metadata_props.update(metadata)
    onnx.save(traced.model_proto, path)  # torch would write weights beside it


def run_onnx(path: Path, inputs: Tensor) -> Tensor:
    """Compute the embeddings of a program that :func:`write_onnx` wrote, in onnxruntime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=onnxruntime.get_available_providers())
    [outputs] = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    return torch.as_tensor(outputs)


def write_archive(program: Program, path: Path, metadata: dict[str, str]) -> None:
    """Write a program as a .pt2 file for ``torch.export.load``, with the values of ``metadata`` as extra files."""
    archive = io.BytesIO()  # on a full disk, the writer of torch 2.13 would abort the process
    extra: Any = {"preprocessing.json": metadata["preprocessing"], "embedding": metadata["embedding"]}
    torch.export.save(trace(program), archive, extra_files=extra)
    path.write_bytes(archive.getbuffer())


def run_archive(path: Path, inputs: Tensor) -> Tensor:
    """Compute the embeddings of a program that :func:`write_archive` wrote."""
    return torch.export.load(path).module()(inputs)


def trace(program: Program) -> torch.export.ExportedProgram:
    """Trace a program for all input sizes that the encoder's ``free_axes`` allow."""
    free_axes = program.student.encoder.free_axes
    free = {axis: torch.export.Dim(name, min=low, max=high) for axis, (name, low, high) in free_axes.items()}
    inputs = program.example(2)  # torch.export treats a batch size of one as constant
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unable to find the path of the module")  # timm's, and it does not matter
        return torch.export.export(program, (inputs,), dynamic_shapes={"inputs": free}, strict=False)
