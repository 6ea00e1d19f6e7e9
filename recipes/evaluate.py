"""Measure a model's embeddings: ``composer recipes/evaluate.py yamls/evaluate.yaml model=PATH [key=value …]``."""

from d2v_composer.commands.evaluate import main
from d2v_composer.system import command_line

__all__ = ["main"]

if __name__ == "__main__":
    command_line.run(main)
