"""Training checkpoint to one self-contained file: ``python recipes/export_student.py CHECKPOINT OUT.safetensors``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from d2v_composer import cli
from d2v_composer.fetch import fetch
from d2v_composer.models.load import export_student
from d2v_composer.models.student import Student


def main(argv: Sequence[str]) -> Student:
    """Export the student of a checkpoint; the frozen encoder comes from the teacher's file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a path, s3://, …")
    parser.add_argument("out", metavar="OUT.safetensors", type=Path)
    parser.add_argument("--teacher", help="where the teacher is now; default where it was when the student trained")
    arguments = parser.parse_args(argv)
    student = export_student(fetch(arguments.checkpoint), arguments.out, arguments.teacher)
    size = sum(parameter.numel() for parameter in student.parameters())
    print(f"wrote {arguments.out}: {size / 1e6:.1f} M parameters, {arguments.out.stat().st_size / 1e6:.1f} MB")
    return student


if __name__ == "__main__":
    cli.run(main)
