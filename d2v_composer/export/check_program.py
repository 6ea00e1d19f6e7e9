"""Compare the embeddings that an exported file computes in a runtime with PyTorch's embeddings.

    python check_program.py onnxruntime student.onnx

The script and its inputs are in a folder that `d2v verify --kit` wrote. The script needs numpy and the runtime. It
prints time, memory and agreement as JSON, and exits with status 1 if a number misses a limit. To measure another
runtime, add the runtime to RUNTIMES.
"""

import json
import sys
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(__file__).parent
Embed = Callable[[np.ndarray], Any]
"""A function that maps inputs, (B, …) float32 or uint8, to embeddings, (B, D)."""


class Runtime(NamedTuple):
    """A runtime for exported files."""

    suffix: str
    """Suffix of the files that the runtime takes."""
    package: str
    load: Callable[[str], Embed]


def load_onnxruntime(file: str) -> Embed:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=onnxruntime.get_available_providers())
    return lambda x: session.run(None, {session.get_inputs()[0].name: x})[0]


def load_openvino(file: str, **config: str) -> Embed:
    import openvino  # pyright: ignore[reportMissingImports]

    model = openvino.Core().compile_model(file, "CPU", config)
    return lambda x: model(x)[0]


def load_litert(file: str) -> Embed:
    from ai_edge_litert.interpreter import Interpreter  # pyright: ignore[reportMissingImports]

    runner = Interpreter(file).get_signature_runner()  # takes one sample
    [name] = runner.get_input_details()
    return lambda x: np.concatenate([next(iter(runner(**{name: row[None]}).values())) for row in x])


def load_executorch(file: str) -> Embed:
    import torch
    from executorch.runtime import Runtime  # pyright: ignore[reportMissingImports]

    method = Runtime.get().load_program(file).load_method("forward")
    return lambda x: method.execute([torch.from_numpy(x)])[0].numpy().copy()


def load_exported(file: str) -> Embed:
    import torch

    run = torch.export.load(file).module()
    return lambda x: run(torch.from_numpy(x)).numpy()


def load_pytorch(file: str) -> Embed:
    import torch

    from d2v_composer.checkpoints.load import load_student

    embed, embedding = load_student(file).embed_all, read_kit()["embedding"]
    return lambda x: embed(torch.from_numpy(x if x.dtype == np.float32 else np.moveaxis(x, -1, 1)))[embedding].numpy()


RUNTIMES = {
    "onnxruntime": Runtime(".onnx", "onnxruntime", load_onnxruntime),
    "openvino": Runtime(".onnx", "openvino", load_openvino),
    "openvino-float32": Runtime(".onnx", "openvino", partial(load_openvino, INFERENCE_PRECISION_HINT="f32")),
    "torch.export": Runtime(".pt2", "torch", load_exported),
    "pytorch": Runtime(".safetensors", "torch", load_pytorch),
    "litert": Runtime(".tflite", "ai_edge_litert", load_litert),
    "executorch": Runtime(".pte", "executorch", load_executorch),
}


def read_kit() -> dict[str, Any]:
    """Return the embedding's name and the limits, from kit.json."""
    return json.loads((FOLDER / "kit.json").read_text())


def measure(runtime: str, file: str) -> dict[str, Any]:
    """Return the measured numbers by name: time, memory, and agreement with PyTorch's embeddings."""
    start = time.perf_counter()
    *inputs, theirs = np.load(FOLDER / "kit.npz").values()
    embed = RUNTIMES[runtime].load(file)
    embed(inputs[0][:1])  # the first call prepares
    seconds = time.perf_counter() - start
    outputs = [embed(x) for x in inputs]
    changes = [np.abs(embed(x[:n]) - y[:n]).max() for x, y in zip(inputs, outputs, strict=True) for n in (1, 7)]
    rates = [n / np.median(timeit.repeat(lambda n=n: embed(inputs[0][:n]), number=1, repeat=9)) for n in (1, 16)]
    ours, largest = np.concatenate(outputs), np.abs(theirs).max()
    units = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (ours, theirs)]
    nearest = [np.argsort(unit @ unit.T - 3 * np.eye(len(unit)))[:, -10:] for unit in units]
    cosines = (units[0] * units[1]).sum(axis=1)
    status = Path("/proc/self/status")  # exists on Linux
    return {
        "load s": seconds,
        "peak MB": int(status.read_text().split("VmHWM:")[1].split()[0]) / 1e3 if status.exists() else 0,
        "cosine": cosines.min(),
        "mean": cosines.mean(),
        "difference": np.abs(ours - theirs).max() / largest,
        "by batch": np.max(changes) / largest,
        "agreement": np.mean([np.isin(*pair).mean() for pair in zip(*nearest, strict=True)]),
        "/s at 1": rates[0],
        "/s at 16": rates[1],
    }


if __name__ == "__main__":
    kit, (_, runtime, file) = read_kit(), sys.argv
    numbers = measure(runtime, file)
    print(json.dumps(numbers, indent=1, default=float))
    limits = {"cosine": (kit["cosine"], 1.001), "agreement": (0.5, 1), "by batch": (0, 0.01)}
    if runtime != "openvino":  # OpenVINO uses bfloat16 if the processor has it
        limits["difference"] = (0, kit["difference"])
    wrong = [key for key, (low, high) in limits.items() if not low <= numbers[key] <= high]  # NaN is not
    sys.exit("; ".join("{} {:.4g}, expected {} to {}".format(key, numbers[key], *limits[key]) for key in wrong) or None)
