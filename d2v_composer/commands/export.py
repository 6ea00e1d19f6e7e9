"""Export a student as one self-contained file.

    d2v export runs/distill/latest-rank0.pt student.safetensors
    d2v export student.safetensors student.onnx
    d2v export student.safetensors student.pt2 --pooling mean --preprocessing in
    d2v export student.safetensors student.onnx --int8 --calibrate photos

OUT's suffix selects the format: ``.safetensors`` for ``load_student`` and timm, ``.onnx``, ``.pt2`` for torch.export.
The last two hold a program that computes one embedding, by default the primary one, and no record of the run. Its
images must be normalized, unless --preprocessing in puts that into the program. For an audio student it takes clips of
any length, but of the same length in a batch. A README.md beside a .safetensors file describes it for the Hugging Face
hub.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from d2v_composer.commands import verify as verification
from d2v_composer.models.names import Pooling, Representation
from d2v_composer.system.command_line import d2v, make_parser, print_next
from d2v_composer.system.errors import InputError
from d2v_composer.system.files import check_out_file

# Suffix → how to load the file, in Python.
PROGRAMS = {
    ".onnx": "import onnxruntime; session = onnxruntime.InferenceSession({!r})",
    ".pt2": "import torch; program = torch.export.load({!r}).module()",
}
# How to load a fine-tuned student.
TIMM = "import timm, d2v_composer; model = timm.create_model('d2v2_student', checkpoint_path={!r}, num_classes={})"
# Every second one calibrates; d2v verify measures with others.
MAX_INT8_IMAGES = 256


def main(argv: Sequence[str]) -> None:
    """Export a student; a training checkpoint needs its teacher's file, for the frozen encoder."""
    parser = make_parser(__doc__)
    parser.add_argument("source", metavar="CHECKPOINT", help="a checkpoint or an exported student: a path, s3://, …")
    parser.add_argument("out", metavar="OUT", type=Path, help="a file: .safetensors, .onnx or .pt2")
    parser.add_argument("--teacher", help="the teacher's file; default: the path used in training")
    for option, choices in (("--pooling", Pooling), ("--representation", Representation)):
        about = "only for .onnx and .pt2; default: as in the run's primary embedding"
        parser.add_argument(option, choices=get_args(choices), help=about)
    about = "in: only for .onnx and .pt2, which then take images as decoded, (B, S, S, 3) uint8; default: out"
    parser.add_argument("--preprocessing", choices=("in", "out"), default="out", help=about)
    about = "only for .onnx: quantize linear layers to 8 bits, with onnxruntime, and measure what is lost there"
    parser.add_argument("--int8", action="store_true", help=about)
    about = "images or MDS shards to calibrate --int8; default: the run's retrieval images"
    parser.add_argument("--calibrate", metavar="FOLDER", help=about)
    parser.add_argument("--verify", action="store_true", help="then measure OUT in each runtime, as d2v verify does")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    arguments = vars(parser.parse_args(argv))
    check_out_file(arguments["out"], overwrite=arguments.pop("overwrite"))
    export(**arguments)


def export(
    source: str,
    out: Path,
    *,
    teacher: str | None = None,
    pooling: Pooling | None = None,
    representation: Representation | None = None,
    preprocessing: str = "out",
    int8: bool = False,
    calibrate: str | None = None,
    verify: bool = False,
) -> None:
    """Export a student, and print what was written; the arguments are the command's."""
    if out.suffix not in (".safetensors", *PROGRAMS):
        raise InputError(f"{out} must end in .safetensors, .onnx or .pt2")
    takes_pixels = preprocessing == "in"
    if out.suffix == ".safetensors" and (pooling or representation or takes_pixels):
        raise InputError(
            f"{out}: a .safetensors file holds every embedding; --pooling, --representation and --preprocessing are "
            "only for .onnx and .pt2"
        )
    if (int8 and out.suffix != ".onnx") or (calibrate and not int8):
        raise InputError(f"{out}: --int8 is only for .onnx, and --calibrate only for --int8")

    from d2v_composer.checkpoints.export import Embedder, check_packages, export_onnx, export_program
    from d2v_composer.checkpoints.load import load_any, save_student
    from d2v_composer.checkpoints.student_file import choose_embedding
    from d2v_composer.models.teacher import Teacher
    from d2v_composer.report.model_card import plan_model_card

    student, _ = load_any(source, teacher_path=teacher)
    if isinstance(student, Teacher):
        raise InputError(f"{source} is a teacher; expected a training checkpoint or an exported student")
    if (int8 or takes_pixels) and len(student.encoder.free_axes) > 1:  # what calibrates would have one length
        option = "--int8" if int8 else "--preprocessing in"
        raise InputError(f"{option}: only for images; this model takes {student.encoder.input_name}")
    embedding = choose_embedding(student, pooling, representation)
    print(f"embedding: {embedding.name}")
    if out.suffix == ".safetensors":
        write_card = plan_model_card(student, source, out) if student.head is None else None
        if write_card is not None:  # first: the same command is refused once OUT is there
            print(write_card())
        save_student(student, out)
        step = d2v("embed", out, "SOURCE", "embeddings.npy")
        if student.head is not None:
            step = TIMM.format(str(out), len(student.state_dict()["head.bias"]))
    else:
        embedder = Embedder(student, embedding, takes_pixels)
        if int8:
            check_packages(out, "onnxruntime")
            from d2v_composer.checkpoints.int8 import quantize

            images = verification.read_samples(student, calibrate, MAX_INT8_IMAGES, takes_pixels)
            with tempfile.TemporaryDirectory() as folder:
                export_onnx(embedder, program := Path(folder) / "float32.onnx")
                quantize(program, out, images[1::2])
        else:
            write = export_onnx if out.suffix == ".onnx" else export_program
            write(embedder, out)
        step = PROGRAMS[out.suffix].format(str(out))
    size = sum(parameter.numel() for parameter in student.parameters())
    print(f"wrote {out}: {size / 1e6:.1f} M parameters, {out.stat().st_size / 1e6:.1f} MB")
    if verify or int8:
        images = calibrate if int8 else verification.SHIPPED[student.encoder.input_name]
        verification.verify(out, student, runtime=None if verify else ["onnxruntime"], images=images)
    print_next(step)
