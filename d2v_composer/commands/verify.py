"""Compare what an exported file computes in each runtime of this machine with PyTorch.

    d2v verify student.onnx
    d2v verify student.onnx --runtime openvino --images photos
    d2v verify student-int8.onnx --student student.safetensors
    d2v verify student.onnx --kit kit

EXPORTED is a .safetensors file, or an .onnx or .pt2 file; the same student's .safetensors file must be beside it, or be
named by --student.
Loading a .pt2 file runs the code in it. For each runtime, the table compares embeddings with PyTorch's: minimum and
mean cosine, neighbor agreement, and two numbers relative to the largest value of an embedding: the largest difference,
and the largest change when other inputs are in the batch. It also shows seconds to load, peak MB, and samples/s in
batches of 1 and 16. The exit status is 1 if a number is out of range. The last line names the fastest runtime whose
numbers are in range. The numbers are written to EXPORTED.verify.json and, if d2v export wrote a README.md beside
EXPORTED, to that model card. --kit writes a folder for a machine with other runtimes: the script in the folder prints
the same numbers, and needs only numpy and the runtime.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from d2v_composer.commands.command import Command, PlaceHere, Positional, one_of
from d2v_composer.export.check_program import RUNTIMES
from d2v_composer.system.errors import InputError

BY_SUFFIX = ", ".join(f"{name} for {runtime.suffix}" for name, runtime in RUNTIMES.items())


class Verify(Command):
    exported: Positional[PlaceHere]
    """The exported file: .onnx, .pt2 or .safetensors."""
    student: Path | None = None
    """The same student's .safetensors file; default: EXPORTED with that suffix."""
    runtime: tuple[Annotated[str, one_of(RUNTIMES)], ...] | None = Field(
        None, description=f"Runtime to measure: {BY_SUFFIX}; may be repeated; default: all that are installed."
    )
    images: str | None = None
    """Images, audio or MDS shards to measure with; default: CIFAR-10 images or spoken words that ship with d2v."""
    cosine: float | None = None
    """Minimum cosine of an embedding with PyTorch's; default: 0.999, or 0.98 for an int8 file."""
    difference: float | None = None
    """Maximum difference from PyTorch, relative to the largest value of an embedding; default: 0.0001, or 9 for an int8
    file; openvino has no limit."""
    kit: PlaceHere | None = None
    """Folder to write, with all that another machine needs to measure EXPORTED; nothing is measured here."""

    def run(self) -> None:
        """Measure an exported file in each runtime, or write the kit for another machine."""
        path = self.student or self.exported.with_suffix(".safetensors")
        if not path.exists():
            raise InputError(f"{path}: no such file; name the student's .safetensors file with --student")

        from d2v_composer.checkpoints.load import load_student
        from d2v_composer.export.verification import SHIPPED, verify

        student = load_student(path)
        verify(
            self.exported,
            student,
            images=self.images or SHIPPED[student.encoder.input_name],
            runtime=self.runtime,
            cosine=self.cosine,
            difference=self.difference,
            kit=self.kit,
        )


main = Verify.main
