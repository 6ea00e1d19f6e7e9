"""Quantize an exported student to int8 with onnxruntime."""

import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from d2v_composer.system.files import out_file

LINEAR = ["Conv", "Gemm", "MatMul"]


def quantize(program: Path, out: Path, images: Tensor) -> None:
    """Write an ONNX program whose linear layers and convolutions compute with int8 weights and uint8 inputs.

    Args:
        program: The one in float32.
        out: The file to write.
        images: As the program takes them. They set the range of each layer's inputs.

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
        weights = {each.name for each in graph.initializer}
        quantize_static(
            prepared,
            partial,
            reader,
            op_types_to_quantize=LINEAR,
            # Not attention's products of two activations. (The option MatMulConstBOnly has no effect in this format.)
            nodes_to_quantize=[each.name for each in graph.node if weights.intersection(each.input)],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={"OpTypesToExcludeOutputQuantization": LINEAR},
        )
