"""Export a student to a .safetensors, .onnx or .pt2 file.

    d2v export runs/distill/latest-rank0.pt student.safetensors
    d2v export student.safetensors student.onnx
    d2v export student.safetensors student.pt2 --pooling mean --preprocessing in
    d2v export student.safetensors student.onnx --int8 --calibrate photos

The suffix of OUT selects the format: .safetensors for d2v and timm, .onnx for ONNX, .pt2 for torch.export.
An .onnx or .pt2 file computes the student's embedding or, with --pooling or --representation, its pooled features.
Without --preprocessing in, the inputs are normalized images, (B, 3, height, width) float32, or 16 kHz clips of one
length, (B, L) float32.
"""

from typing import Literal

from d2v_composer.commands.command import Command, PlaceHere, Positional
from d2v_composer.models.names import Pooling, Representation
from d2v_composer.system.command_line import d2v, print_next
from d2v_composer.system.errors import InputError
from d2v_composer.system.files import check_out_file

# Suffix → how to load the file, in Python.
PROGRAMS = {
    ".onnx": "import onnxruntime; session = onnxruntime.InferenceSession({!r})",
    ".pt2": "import torch; program = torch.export.load({!r}).module()",
}


class Export(Command):
    checkpoint: Positional[str]
    """Path or address of a student's training checkpoint or .safetensors file."""
    out: Positional[PlaceHere]
    """File to write: NAME.safetensors, NAME.onnx or NAME.pt2."""
    teacher: str | None = None
    """The teacher's file, for a training checkpoint; default: the path in the checkpoint."""
    pooling: Pooling | None = None
    """Only for .onnx and .pt2: pooling of the features to export instead of the student's embedding."""
    representation: Representation | None = None
    """Only for .onnx and .pt2: features that are pooled and exported instead of the student's embedding."""
    preprocessing: Literal["in", "out"] = "out"
    """in: the .onnx or .pt2 file normalizes images, and takes resized pixels, (B, height, width, 3) uint8."""
    int8: bool = False
    """Only for images and .onnx: quantize the student to int8, and compare the embeddings with PyTorch's embeddings."""
    calibrate: str | None = None
    """Images that calibrate --int8: a folder or other SOURCE of d2v embed; default: the retrieval images of the
    run that trained the student."""
    overwrite: bool = False
    """Replace OUT if it exists."""

    def run(self) -> None:
        source, out, takes_pixels = self.checkpoint, self.out, self.preprocessing == "in"
        check_out_file(out, overwrite=self.overwrite)
        if out.suffix not in (".safetensors", *PROGRAMS):
            raise InputError(f"{out} must end in .safetensors, .onnx or .pt2")
        if out.suffix == ".safetensors" and (self.pooling or self.representation or takes_pixels):
            raise InputError(f"{out}: --pooling, --representation and --preprocessing are only for .onnx and .pt2")
        if self.int8 and out.suffix != ".onnx":
            raise InputError(f"{out}: --int8 is only for .onnx")
        if self.calibrate and not self.int8:
            raise InputError("--calibrate can be used only with --int8")

        from d2v_composer.checkpoints.timm_student import timm_call
        from d2v_composer.config.reference import load_any
        from d2v_composer.export.int8 import export_int8, read_images
        from d2v_composer.export.model_card import save_with_card, size_of
        from d2v_composer.export.programs import Program, export_program
        from d2v_composer.models.teacher import Teacher

        student, _ = load_any(source, teacher=self.teacher)
        if isinstance(student, Teacher):
            raise InputError(f"{source} is a teacher; expected a training checkpoint or an exported student")
        if (self.int8 or takes_pixels) and len(student.encoder.free_axes) > 1:  # what calibrates would have one length
            raise InputError(
                f"{'--int8' if self.int8 else '--preprocessing in'}: only for images; this model takes "
                f"{student.encoder.input_name}"
            )
        embedding = student.choose_embedding(self.pooling, self.representation)
        print(f"embedding: {student.describe(embedding)}")
        if out.suffix == ".safetensors":
            save_with_card(student, source, out)
            steps = [d2v("embed", out, "SOURCE", "embeddings.npy")]
            if student.head is not None:
                steps = [f"import timm, d2v_composer.timm_models; model = {timm_call(student, out)}"]
        else:
            program = Program(student, embedding, takes_pixels)
            if self.int8:
                print(export_int8(program, out, read_images(student, self.calibrate, takes_pixels)))
            else:
                export_program(program, out)
            steps = [PROGRAMS[out.suffix].format(str(out))]
            print(size_of(student, out))
        print_next(*steps)


main = Export.main
