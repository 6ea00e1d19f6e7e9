"""Export a student as one self-contained file: ``python recipes/export_student.py CHECKPOINT OUT``."""

from d2v_composer.commands.export import main
from d2v_composer.system import command_line

__all__ = ["main"]

if __name__ == "__main__":
    command_line.run(main)
