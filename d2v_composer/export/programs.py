"""Export a student to ONNX, also in int8, or to torch.export."""

import copy
import io
import json
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from d2v_composer.checkpoints.load import load_student
from d2v_composer.export.check_program import RUNTIMES
from d2v_composer.models.attention import Alibi
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.names import EMBEDDING
from d2v_composer.models.precision import is_equal_but_for_rounding
from d2v_composer.system.errors import InputError, errors_of, reading
from d2v_composer.system.files import out_file

OPSET = 18
MAX_ONNX = 2_000_000_000  # bytes of weights in a file
# What becomes int8.
QUANTIZED_OPS = ["Conv", "Gemm", "MatMul"]
# How a file says that its program takes pixels.
PIXELS = "uint8, (B, H, W, channels)"
# The files in a .pt2 file that hold the values of :func:`metadata_of`.
EXTRA_FILES = ("preprocessing.json", "embedding")


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
    """Write a program to an .onnx or .pt2 file, and check with one input that the file computes the same embedding.

    Raises:
        InputError: The file computes another embedding, or the student is too large.
        RunError: The disk is full.
    """
    metadata = metadata_of(program.student, program.embedding, program.takes_pixels)
    with out_file(path) as partial, errors_of(str(path), InputError):
        (write_onnx if path.suffix == ".onnx" else write_archive)(program, partial, metadata)
        load = next(runtime.load for runtime in RUNTIMES.values() if runtime.suffix == path.suffix)
        inputs = program.example(1)
        inputs = torch.randint_like(inputs, 256) if program.takes_pixels else torch.randn_like(inputs)
        outputs = torch.from_numpy(load(str(partial))(inputs.numpy()))
        if not is_equal_but_for_rounding(outputs, program.compute(program.original, inputs)):
            raise InputError("the exported model's embeddings differ from the student's, so the file was not written")


def metadata_of(student: Backbone, embedding: str, takes_pixels: bool) -> dict[str, str]:
    """Return the metadata of a student's program: ``preprocessing``, as JSON, and ``embedding``, a name."""
    config = student.encoder.config
    preprocessing = {name: getattr(config, name) for name in config.preprocessing}
    if takes_pixels:
        del preprocessing["image_mean"], preprocessing["image_std"]
        preprocessing["inputs"] = PIXELS
    return {"preprocessing": json.dumps(preprocessing), "embedding": embedding}


def read_metadata(path: Path, student: Backbone) -> tuple[str, bool, bool]:
    """Return the name of an exported file's embedding, whether the file is int8, and whether it takes uint8 pixels.

    Raises:
        InputError: The file cannot be read, or was not exported from this student.
    """
    stored, is_int8 = {"embedding": ""}, False
    with reading(path):
        if path.suffix == ".onnx":
            import onnx

            model = onnx.load(path)
            stored |= {entry.key: entry.value for entry in model.metadata_props}
            is_int8 = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
        elif path.suffix == ".pt2":
            torch.export.load(path, extra_files=(stored := dict.fromkeys(EXTRA_FILES, "")))
            stored["preprocessing"] = stored[EXTRA_FILES[0]]
        elif path.suffix == ".safetensors":
            stored = metadata_of(load_student(path), EMBEDDING, takes_pixels=False)
    if (embedding := stored["embedding"]) not in (EMBEDDING, *student.raw_names):
        raise InputError(f"{path} must be an .onnx, .pt2 or .safetensors file that d2v export wrote from this student")
    takes_pixels = PIXELS in stored["preprocessing"]
    expected = metadata_of(student, embedding, takes_pixels)["preprocessing"]
    if stored["preprocessing"] != expected:
        raise InputError(
            f"{path}: its preprocessing is {stored['preprocessing']}, but the student's preprocessing is {expected}; "
            "--student must name the student that was exported"
        )
    return embedding, is_int8, takes_pixels


def write_onnx(program: Program, path: Path, metadata: dict[str, str]) -> None:
    """Write a program as ONNX, with the input ``images`` or ``waveforms`` and the output ``embedding``, (batch, D).

    Raises:
        InputError: The student's weights take more than 2 GB.
    """
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


def write_archive(program: Program, path: Path, metadata: dict[str, str]) -> None:
    """Write a program as a .pt2 file for ``torch.export.load``, with the values of ``metadata`` as extra files."""
    archive = io.BytesIO()  # on a full disk, the writer of torch 2.13 would abort the process
    extra: Any = dict(zip(EXTRA_FILES, metadata.values(), strict=True))
    torch.export.save(trace(program), archive, extra_files=extra)
    path.write_bytes(archive.getbuffer())


def trace(program: Program) -> torch.export.ExportedProgram:
    """Trace a program for all input sizes that the encoder's ``free_axes`` allow."""
    free_axes = program.student.encoder.free_axes
    free = {axis: torch.export.Dim(name, min=low, max=high) for axis, (name, low, high) in free_axes.items()}
    inputs = program.example(2)  # torch.export treats a batch size of one as constant
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unable to find the path of the module")  # timm's, and it does not matter
        return torch.export.export(program, (inputs,), dynamic_shapes={"inputs": free}, strict=False)


def quantize(program: Path, out: Path, images: Tensor) -> None:
    """Quantize an ONNX program: linear layers and convolutions get int8 weights and uint8 activations.

    Args:
        program: File of the program in float32.
        out: The file to write.
        images: Inputs of the program, (N, …), from which the ranges of the activations are found.

    Raises:
        RunError: The disk is full.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    feeds = ({"images": batch.numpy()} for batch in images.split(32))
    reader: Any = SimpleNamespace(get_next=lambda: next(feeds, None))
    with tempfile.TemporaryDirectory() as folder, out_file(out) as partial:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(program, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        weights = {tensor.name for tensor in graph.initializer}
        quantize_static(
            prepared,
            partial,
            reader,
            op_types_to_quantize=QUANTIZED_OPS,
            # Not attention's products of two activations. (The option MatMulConstBOnly has no effect in this format.)
            nodes_to_quantize=[node.name for node in graph.node if weights.intersection(node.input)],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": QUANTIZED_OPS},
        )
