"""Export a student as one self-contained file: ``python recipes/export_student.py CHECKPOINT OUT``.

    python recipes/export_student.py runs/distill/latest-rank0.pt student.safetensors
    python recipes/export_student.py student.safetensors student.onnx
    python recipes/export_student.py student.safetensors student.pt2 --pooling mean

OUT's suffix selects the format: ``.safetensors`` for ``load_student`` and timm, ``.onnx``, ``.pt2`` for torch.export.
The last two hold a program that computes one embedding, by default the headline of the student's run, and no record of
the run.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from d2v_composer.checkpoints.export import Embedder, export_onnx, export_program
from d2v_composer.checkpoints.headline import choose_embedding
from d2v_composer.checkpoints.load import load_any, save_student
from d2v_composer.models.names import Pooling, Representation
from d2v_composer.models.student import Student
from d2v_composer.system.atomic_files import check_out_file
from d2v_composer.system.errors import InputError

PROGRAMS = {".onnx": export_onnx, ".pt2": export_program}


def main(argv: Sequence[str]) -> Student:
    """Export a student; a training checkpoint needs its teacher's file, for the frozen encoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="CHECKPOINT", help="of a run, or an exported student; a path, s3://, …")
    parser.add_argument("out", metavar="OUT", type=Path, help="a file: .safetensors, .onnx or .pt2")
    parser.add_argument("--teacher", help="the teacher's file; default: the path used in training")
    parser.add_argument("--pooling", choices=get_args(Pooling), help="of .onnx, .pt2; default: the run's headline")
    parser.add_argument(
        "--representation", choices=get_args(Representation), help="of .onnx, .pt2; default: the run's headline"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    arguments = parser.parse_args(argv)
    out = arguments.out
    if out.suffix not in (".safetensors", *PROGRAMS):
        raise InputError(f"{out}: must end in .safetensors, .onnx or .pt2")
    if out.suffix == ".safetensors" and (arguments.pooling or arguments.representation):
        raise InputError(f"{out}: holds every embedding: --pooling and --representation are for .onnx and .pt2")
    check_out_file(out, overwrite=arguments.overwrite)
    student, _ = load_any(arguments.source, teacher_path=arguments.teacher)
    if student is None:
        raise InputError(f"{arguments.source}: is a teacher; expected a training checkpoint or an exported student")
    embedding = choose_embedding(student, student.provenance, arguments.pooling, arguments.representation)
    print(f"embedding: {embedding}")
    if out.suffix == ".safetensors":
        save_student(student, out)
    else:
        PROGRAMS[out.suffix](Embedder(student, embedding.headline), out)
    size = sum(parameter.numel() for parameter in student.parameters())
    print(f"wrote {out}: {size / 1e6:.1f} M parameters, {out.stat().st_size / 1e6:.1f} MB")
    return student
