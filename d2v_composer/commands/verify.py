"""Compare an exported file in each runtime of this machine with the student in PyTorch.

    d2v verify student.onnx
    d2v verify student.onnx --runtime openvino --images photos
    d2v verify student-int8.onnx --student student.safetensors
    d2v verify student.onnx --kit kit

Loading a .pt2 file can run code that the file contains.
The table has a row for PyTorch and a row for each runtime. 'cosine' is the smallest cosine between an embedding and
PyTorch's embedding of the same sample, and 'mean' is the mean of these cosines. 'difference' is the largest absolute
difference between a value and PyTorch's value, and 'by batch' is the largest change of a value in smaller batches; both
are divided by the largest absolute value in PyTorch's embeddings. 'agreement' is the share of a sample's ten nearest
neighbors that PyTorch finds, too. '/s at 1' and '/s at 16' are samples per second in batches of 1 and 16.
The exit status is 1 if a runtime fails or misses a limit.
The numbers are written to EXPORTED.verify.json and, if there is a model card beside EXPORTED, to this card.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from d2v_composer.commands.command import Command, PlaceHere, Positional, one_of
from d2v_composer.export.check_program import RUNTIMES
from d2v_composer.system.errors import InputError


class Verify(Command):
    exported: Positional[PlaceHere]
    """The .onnx, .pt2 or .safetensors file that d2v export wrote."""
    student: Path | None = None
    """The same student's .safetensors file; default: EXPORTED with the suffix .safetensors."""
    runtime: tuple[Annotated[str, one_of(RUNTIMES)], ...] | None = Field(
        None,
        description="Runtime to measure: onnxruntime, openvino or openvino-float32 for .onnx, torch.export for .pt2, "
        "pytorch for .safetensors; may be repeated; default: all installed runtimes for EXPORTED.",
    )
    images: str | None = None
    """Samples to measure with: a folder or other SOURCE of d2v embed; default: images or spoken words that ship with
    d2v."""
    cosine: float | None = None
    """Smallest allowed value of 'cosine'; default: 0.999, or 0.98 for an int8 file."""
    difference: float | None = None
    """Largest allowed value of 'difference'; default: 0.0001, or 9 for an int8 file; openvino has no limit."""
    kit: PlaceHere | None = None
    """Folder to write instead of measuring. The script in the folder measures EXPORTED, or a .tflite or .pte file made
    from EXPORTED, on a machine with numpy and the runtime."""

    def run(self) -> None:
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
