"""Convert a fairseq checkpoint to a safe file: ``python recipes/convert_teacher.py IN.pt OUT.safetensors``."""

from d2v_composer.commands.convert_teacher import main
from d2v_composer.system import command_line

__all__ = ["main"]

if __name__ == "__main__":
    command_line.run(main)
