"""Export a student of images to ONNX in int8, and measure how much the embeddings differ from PyTorch's."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from d2v_composer.data import modality_of
from d2v_composer.export.programs import Program, export_program, run_onnx
from d2v_composer.models.backbone import Backbone
from d2v_composer.models.configs import height_and_width
from d2v_composer.models.images import resize
from d2v_composer.models.provenance import value_at
from d2v_composer.sources.labeled import ONLY_SAMPLES, evenly_spaced, open_labeled_sets
from d2v_composer.sources.open import open_source
from d2v_composer.system.errors import InputError, RunError
from d2v_composer.system.files import out_file

# Every second image calibrates, and the others are compared.
MAX_IMAGES, MIN_IMAGES = 256, 20
MIN_COSINE = 0.98
# What becomes int8.
QUANTIZED_OPS = ["Conv", "Gemm", "MatMul"]


def export_int8(program: Program, path: Path, images: Tensor) -> str:
    """Write a program to an .onnx file in int8, and return a line that compares its embeddings with PyTorch's."""
    with tempfile.TemporaryDirectory() as folder, out_file(path) as partial:
        export_program(program, exact := Path(folder) / "float32.onnx")
        quantize(exact, partial, images[1::2])
        compared = images[::2]
        expected = program.compute(program.original, compared)
        cosines = torch.nn.functional.cosine_similarity(run_onnx(partial, compared), expected)
        found = f"cosine to PyTorch's embeddings of {len(compared)} other images: smallest {cosines.min():.4f}"
        if not cosines.min() >= MIN_COSINE:  # NaN is not
            raise RunError(f"{path}: {found}, expected at least {MIN_COSINE}, so the file was not written")
    return f"int8: {found}, mean {cosines.mean():.4f}"


def read_images(student: Backbone, source: str | None, takes_pixels: bool) -> Tensor:
    """Return at most ``MAX_IMAGES`` images in the form that the student's program takes as input.

    The images are normalized, (N, 3, height, width); with ``takes_pixels``, they are (N, height, width, 3) uint8.
    """
    config = student.encoder.config
    modality, images = modality_of(config), []
    if source is not None:
        opened = open_source(source, modality)
        images = [opened.decode(i) for i in evenly_spaced(len(opened), MAX_IMAGES)]
    elif section := value_at(student.provenance, "config.retrieval"):
        for load in [*open_labeled_sets(section, modality, **ONLY_SAMPLES, max_images=MAX_IMAGES).values()][:1]:
            images = load().test.samples
    if len(images) < MIN_IMAGES:
        raise InputError(
            f"expected at least {MIN_IMAGES} images, got {len(images)}; choose a larger source with --calibrate"
        )
    batch = torch.stack([*images])
    if takes_pixels:
        return resize(batch, height_and_width(config.image_size), config.interpolation).movedim(1, -1)
    return student.encoder.normalized(batch)


def quantize(program: Path, path: Path, images: Tensor) -> None:
    """Quantize an ONNX program: linear layers and convolutions get int8 weights and uint8 activations.

    Args:
        program: File of the program in float32.
        path: The file to write.
        images: Inputs of the program, (N, …), from which the ranges of the activations are found.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    feeds = ({"images": batch.numpy()} for batch in images.split(32))
    reader: Any = SimpleNamespace(get_next=lambda: next(feeds, None))
    prepared = program.with_name("prepared.onnx")
    quant_pre_process(program, prepared, skip_symbolic_shape=True)
    graph = onnx.load(prepared).graph
    weights = {tensor.name for tensor in graph.initializer}
    quantize_static(
        prepared,
        path,
        reader,
        op_types_to_quantize=QUANTIZED_OPS,
        # Not attention's products of two activations. (The option MatMulConstBOnly has no effect in this format.)
        nodes_to_quantize=[node.name for node in graph.node if weights.intersection(node.input)],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={"OpTypesToExcludeOutputQuantization": QUANTIZED_OPS},
    )
