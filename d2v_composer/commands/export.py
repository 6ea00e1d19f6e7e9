"""Export a student as one self-contained file.

    d2v export runs/distill/latest-rank0.pt student.safetensors
    d2v export student.safetensors student.onnx
    d2v export student.safetensors student.pt2 --pooling mean

OUT's suffix selects the format: ``.safetensors`` for ``load_student`` and timm, ``.onnx``, ``.pt2`` for torch.export.
The last two hold a program that computes one embedding, by default the primary one, and no record of
the run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

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


def main(argv: Sequence[str]) -> None:
    """Export a student; a training checkpoint needs its teacher's file, for the frozen encoder."""
    parser = make_parser(__doc__)
    parser.add_argument("source", metavar="CHECKPOINT", help="of a run, or an exported student; a path, s3://, …")
    parser.add_argument("out", metavar="OUT", type=Path, help="a file: .safetensors, .onnx or .pt2")
    parser.add_argument("--teacher", help="the teacher's file; default: the path used in training")
    for option, choices in (("--pooling", Pooling), ("--representation", Representation)):
        about = "of .onnx, .pt2; default: the run's primary embedding"
        parser.add_argument(option, choices=get_args(choices), help=about)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    arguments = parser.parse_args(argv)
    out = arguments.out
    if out.suffix not in (".safetensors", *PROGRAMS):
        raise InputError(f"{out}: must end in .safetensors, .onnx or .pt2")
    if out.suffix == ".safetensors" and (arguments.pooling or arguments.representation):
        raise InputError(f"{out}: holds every embedding: --pooling and --representation are for .onnx and .pt2")
    check_out_file(out, overwrite=arguments.overwrite)

    from d2v_composer.checkpoints.export import Embedder, export_onnx, export_program
    from d2v_composer.checkpoints.load import load_any, save_student
    from d2v_composer.checkpoints.student_file import choose_embedding
    from d2v_composer.models.student import Student

    student, _ = load_any(arguments.source, teacher_path=arguments.teacher)
    if not isinstance(student, Student):
        raise InputError(f"{arguments.source}: is a teacher; expected a training checkpoint or an exported student")
    embedding = choose_embedding(student, arguments.pooling, arguments.representation)
    print(f"embedding: {embedding.name}")
    head = student.state_dict().get("head.weight")
    if out.suffix == ".safetensors":
        save_student(student, out)
        step = d2v("embed", out, "IMAGES", "embeddings.npy") if head is None else TIMM.format(str(out), len(head))
    else:
        write = export_onnx if out.suffix == ".onnx" else export_program
        write(Embedder(student, embedding), out)
        step = PROGRAMS[out.suffix].format(str(out))
    size = sum(parameter.numel() for parameter in student.parameters())
    print(f"wrote {out}: {size / 1e6:.1f} M parameters, {out.stat().st_size / 1e6:.1f} MB")
    print_next(step)
