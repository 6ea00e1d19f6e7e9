"""Measure what an exported file computes in each runtime of this machine, against PyTorch.

    d2v verify student.onnx
    d2v verify student.onnx --runtime openvino --images photos
    d2v verify student-int8.onnx --student student.safetensors
    d2v verify student.onnx --kit kit

EXPORTED is a .safetensors file, or an .onnx or .pt2 file that has the same student's .safetensors file beside it.
Loading a .pt2 file runs the code in it. For each runtime, the table compares embeddings with PyTorch's: minimum and
mean cosine, neighbor agreement, and two numbers relative to the largest value of an embedding: the largest difference,
and the largest change when other inputs are in the batch. It also shows seconds to load, peak MB, and samples/s in
batches of 1 and 16. The exit status is 1 if a number is out of range. The last line names the fastest runtime that is
in range. The numbers go to EXPORTED.verify.json and to the model card beside the file. --kit writes a folder for a
machine with other runtimes: the script in it prints the same numbers, and needs only numpy and the runtime.
"""

from collections.abc import Sequence

from d2v_composer.commands.options import make_parser
from d2v_composer.export.check_program import RUNTIMES
from d2v_composer.system.errors import InputError


def main(argv: Sequence[str]) -> None:
    """Measure an exported file in each runtime, or write the kit for another machine."""
    about = ", ".join(f"{name} for {runtime.suffix}" for name, runtime in RUNTIMES.items())
    arguments = vars(make_parser(__doc__, "verify", runtimes=RUNTIMES, about_runtimes=about).parse_args(argv))
    path = arguments.pop("student") or arguments["exported"].with_suffix(".safetensors")
    if not path.exists():
        raise InputError(f"{path}: no such file; name the student's .safetensors file by --student")

    from d2v_composer.checkpoints.load import load_student
    from d2v_composer.export.verification import SHIPPED, verify

    student, images = load_student(path), arguments.pop("images")
    verify(student=student, images=images or SHIPPED[student.encoder.input_name], **arguments)
