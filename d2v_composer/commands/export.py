"""Export a student as one self-contained file.

    d2v export runs/distill/latest-rank0.pt student.safetensors
    d2v export student.safetensors student.onnx
    d2v export student.safetensors student.pt2 --pooling mean --preprocessing in
    d2v export student.safetensors student.onnx --int8 --calibrate photos

OUT's suffix selects the format: ``.safetensors`` for ``load_student`` and timm, ``.onnx``, ``.pt2`` for torch.export.
An .onnx or .pt2 file computes the embedding, or a raw one that --pooling or --representation names. An image
student's file takes normalized images or, with --preprocessing in, images as decoded. An audio student's file takes
clips of any length, but of the same length in a batch. The README.md beside a .safetensors file describes the student
for the Hugging Face hub.
"""

import tempfile
from pathlib import Path
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
# Every second one calibrates; d2v verify measures with others.
MAX_INT8_IMAGES = 256


class Export(Command):
    checkpoint: Positional[str]
    """Training checkpoint or exported file of a student: a path, s3://, …."""
    out: Positional[PlaceHere]
    """File to write: NAME.safetensors, NAME.onnx or NAME.pt2."""
    teacher: str | None = None
    """The teacher's file, for a training checkpoint; default: the path that was used in training."""
    pooling: Pooling | None = None
    """Only for .onnx and .pt2: pooling of a raw embedding, instead of the student's embedding."""
    representation: Representation | None = None
    """Only for .onnx and .pt2: representation of a raw embedding, instead of the student's embedding."""
    preprocessing: Literal["in", "out"] = "out"
    """Only for .onnx and .pt2: in: the file also normalizes images; it takes them as decoded, (B, S, S, 3) uint8."""
    int8: bool = False
    """Only for .onnx: quantize linear layers to 8 bits with onnxruntime, and compare the result with PyTorch."""
    calibrate: str | None = None
    """Images or MDS shards that calibrate --int8; default: the run's retrieval images."""
    verify: bool = False
    """After the export, measure OUT in each installed runtime, as d2v verify does."""
    overwrite: bool = False
    """Replace OUT if it exists."""

    def run(self) -> None:
        """Export a student; a training checkpoint needs its teacher's file, for the frozen encoder."""
        source, out, takes_pixels = self.checkpoint, self.out, self.preprocessing == "in"
        check_out_file(out, overwrite=self.overwrite)
        if out.suffix not in (".safetensors", *PROGRAMS):
            raise InputError(f"{out} must end in .safetensors, .onnx or .pt2")
        if out.suffix == ".safetensors" and (self.pooling or self.representation or takes_pixels):
            raise InputError(
                f"{out}: a .safetensors file holds every embedding; --pooling, --representation and --preprocessing "
                "are only for .onnx and .pt2"
            )
        if (self.int8 and out.suffix != ".onnx") or (self.calibrate and not self.int8):
            raise InputError(f"{out}: --int8 is only for .onnx, and --calibrate only for --int8")

        from d2v_composer.checkpoints.timm_student import timm_call
        from d2v_composer.config.reference import load_any
        from d2v_composer.export import verification
        from d2v_composer.export.model_card import save_with_card, size_of
        from d2v_composer.export.programs import Program, export_program, quantize
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
                images = verification.read_samples(student, self.calibrate, MAX_INT8_IMAGES, takes_pixels)
                with tempfile.TemporaryDirectory() as folder:
                    export_program(program, exact := Path(folder) / "float32.onnx")
                    quantize(exact, out, images[1::2])
            else:
                export_program(program, out)
            steps = [PROGRAMS[out.suffix].format(str(out))]
            if source.endswith(".safetensors") and not self.verify:
                steps.append(d2v("verify", out, "--student", source))
            print(size_of(student, out))
        if self.verify or self.int8:
            images = self.calibrate if self.int8 else verification.SHIPPED[student.encoder.input_name]
            verification.verify(out, student, runtime=None if self.verify else ["onnxruntime"], images=images)
        print_next(*steps)


main = Export.main
