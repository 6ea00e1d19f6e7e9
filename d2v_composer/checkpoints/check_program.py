"""Compare what an exported file computes with what PyTorch computed, in each runtime that is installed.

    python check_program.py
    python check_program.py --runtime onnxruntime-tensorrt --runtime openvino

It runs in the folder that `d2v verify EXPORTED --kit FOLDER` wrote, and needs numpy and the runtime alone: inputs and
PyTorch's results are in kit.npz, the file's name and what is demanded of it in kit.json. For another runtime, call
``check(embed, read_kit())`` with a function from inputs to embeddings, both arrays. Exit status 1: something is wrong.

Shapes: B inputs of a batch, D channels of the embedding.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Embed = Callable[[Any], Any]
NUM_NEIGHBORS = 10
# Largest difference of one input's embeddings in batches of different sizes, as a share of the largest number.
SAME = 0.01
KIT, ARRAYS = "kit.json", "kit.npz"
RATED = (1, 16)
"""Batch sizes whose speed is measured, for so long each."""
SECONDS = 0.5
NUMBERS = {"seconds": ".1f", "megabytes": ".0f", "cosine": ".6f", "mean_cosine": ".6f", "difference": ".1e"}
NUMBERS |= {"agreement": ".3f"}
WIDTH = 17
HEAD = "  ".join(f"{name:{WIDTH}}" if name == "runtime" else f"{name:>{WIDTH}}" for name in ("runtime", *NUMBERS))
HEAD += "".join(f"  {f'inputs/s at {size}':>{WIDTH}}" for size in RATED)


class Runtime(NamedTuple):
    """A program that runs exported files."""

    suffix: str
    package: str
    """What is imported."""
    load: Callable[[str], Embed]
    """From a file's path to what embeds: (B, …) float32 → (B, D)."""
    is_float32: bool = True
    """It computes in float32, as PyTorch did; others may round as their device does."""


class Kit(NamedTuple):
    """What is to be computed."""

    file: str
    batches: list[tuple[Any, Any]]
    """Inputs and PyTorch's embeddings of each batch."""
    cosine: float
    """Least cosine of an embedding to PyTorch's."""
    difference: float | None
    """In float32: largest difference of a number from PyTorch's, as a share of the largest number."""

    def write(self, folder: Path) -> None:
        """Write the kit's two files."""
        kit = {name: each for name, each in self._asdict().items() if name != "batches"}
        (folder / KIT).write_text(json.dumps(kit | {"file": Path(self.file).name}, indent=1) + "\n")
        pairs = enumerate(self.batches)
        np.savez(folder / ARRAYS, **{f"{name}{i}": each for i, pair in pairs for name, each in zip("xy", pair)})  # noqa: B905


def read_kit(folder: Path = Path(__file__).parent) -> Kit:
    """Read what :meth:`Kit.write` wrote."""
    kit, arrays = json.loads((folder / KIT).read_text()), np.load(folder / ARRAYS)
    batches = [(arrays[f"x{i}"], arrays[f"y{i}"]) for i in range(len(arrays.files) // 2)]
    return Kit(**kit | {"file": str(folder / kit["file"]), "batches": batches})


def load_onnxruntime(file: str) -> Embed:
    import onnxruntime  # of its builds for GPUs or Apple's chips, the fastest provider: --difference must be larger

    session = onnxruntime.InferenceSession(file, providers=onnxruntime.get_available_providers())
    (given,) = session.get_inputs()
    return lambda x: session.run(None, {given.name: x})[0]


def load_openvino(file: str, **config: str) -> Embed:
    import openvino

    model = openvino.Core().compile_model(file, "CPU", config)
    return lambda x: model(x)[0]


def load_program(file: str, compiles: bool = False) -> Embed:
    import torch

    module: Any = torch.export.load(file).module()
    module = torch.compile(module, dynamic=True) if compiles else module
    return lambda x: module(torch.from_numpy(x)).numpy()


RUNTIMES = {
    "onnxruntime": Runtime(".onnx", "onnxruntime", load_onnxruntime),
    "openvino": Runtime(".onnx", "openvino", load_openvino, False),  # bfloat16 where the processor has it
    "openvino-float32": Runtime(".onnx", "openvino", partial(load_openvino, INFERENCE_PRECISION_HINT="f32")),
    "torch.export": Runtime(".pt2", "torch", load_program),
    "torch.compile": Runtime(".pt2", "torch", partial(load_program, compiles=True)),
}


def check(embed: Embed, kit: Kit, is_float32: bool = False) -> dict[str, Any]:
    """Embed each batch, and return how near the results are to PyTorch's, and what is wrong.

    Returns:
        ``cosine``, the least one, and ``mean_cosine``; ``difference``, the largest one of a number, as a share of the
        largest number; ``agreement``, the mean share of the :data:`NUM_NEIGHBORS` nearest inputs in common, in the
        largest batch; ``faults``, a list of texts.
    """
    found = [np.asarray(embed(inputs), np.float32) for inputs, _ in kit.batches]
    rows, expected = np.concatenate(found), np.concatenate([outputs for _, outputs in kit.batches])
    cosines, difference = cosine(rows, expected), float(np.abs(rows - expected).max() / np.abs(expected).max())
    faults = []
    if not np.isfinite(rows).all():
        faults.append("numbers that are not finite")
    elif not np.ptp(rows, axis=0).any():
        faults.append("the same embedding for every input")
    if not cosines.min() >= kit.cosine:  # NaN is not
        faults.append(f"cosine {cosines.min():.4f}, expected at least {kit.cosine}")
    if is_float32 and kit.difference is not None and not difference <= kit.difference:
        faults.append(f"difference {difference:.1e}, expected at most {kit.difference:.0e}")
    largest = max(range(len(found)), key=lambda i: len(found[i]))
    inputs, outputs = kit.batches[largest]
    for (fewer, _), own in zip(kit.batches, found, strict=True):
        change = np.abs(own - found[largest][: len(own)]).max() / np.abs(outputs).max()
        if np.array_equal(fewer, inputs[: len(own)]) and not change <= SAME:
            faults.append(f"other embeddings of {len(own)} inputs in a batch of {len(inputs)}")
    common = nearest(found[largest])[:, :, None] == nearest(outputs)[:, None]
    numbers = {"cosine": cosines.min(), "mean_cosine": cosines.mean(), "agreement": common.any(2).mean()}
    return {name: float(each) for name, each in numbers.items()} | {"difference": difference, "faults": faults}


def cosine(first: Any, second: Any) -> Any:
    """Return the cosine of each row with its fellow, (B,)."""
    return (unit(first) * unit(second)).sum(axis=1)


def unit(rows: Any) -> Any:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def nearest(rows: Any) -> Any:
    """Return the indices of the other rows with the largest cosine, (B, :data:`NUM_NEIGHBORS`) or all of fewer."""
    similarity = unit(rows) @ unit(rows).T
    np.fill_diagonal(similarity, -np.inf)
    return np.argsort(-similarity, axis=1)[:, : min(NUM_NEIGHBORS, len(rows) - 1)]


def rates(embed: Embed, kit: Kit) -> list[float]:
    """Return how many inputs a second are embedded in batches of each size in :data:`RATED`."""
    inputs, found = max((inputs for inputs, _ in kit.batches), key=len), []
    for size in RATED:
        batch, times, end = inputs[:size], list[float](), time.perf_counter() + SECONDS
        while time.perf_counter() < end or not times:
            start = time.perf_counter()
            embed(batch)
            times.append(time.perf_counter() - start)
        found.append(len(batch) / float(np.median(times)))
    return found


def line(name: str, found: Mapping[str, Any], speeds: Sequence[float]) -> str:
    """Return a runtime's line of the table, below :data:`HEAD`."""
    cells = [f"{found[key]:{form}}" if key in found else "" for key, form in NUMBERS.items()]
    cells += [f"{speed:.1f}" for speed in speeds]
    return "  ".join(
        [f"{name:{WIDTH}}", *(f"{cell:>{WIDTH}}" for cell in cells), "FAILED" if found["faults"] else "ok"]
    )


def main() -> int:
    """Print the table and what is wrong, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runtime", action="append", choices=RUNTIMES, help="may be repeated; default: all")
    kit, faults = read_kit(), []
    print(HEAD)
    for name in parser.parse_args().runtime or RUNTIMES:
        runtime = RUNTIMES[name]
        if find_spec(runtime.package) and kit.file.endswith(runtime.suffix):
            embed = runtime.load(kit.file)
            found = check(embed, kit, runtime.is_float32)
            print(line(name, found, rates(embed, kit)))
            faults += [f"{name}: {fault}" for fault in found["faults"]]
    print("\n".join(faults))
    return len(faults)


if __name__ == "__main__":
    sys.exit(main())
