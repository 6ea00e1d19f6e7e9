"""Embed a collection of images: ``python recipes/embed.py MODEL SOURCE OUT``."""

from d2v_composer.commands.embed import main
from d2v_composer.system import command_line

__all__ = ["main"]

if __name__ == "__main__":
    command_line.run(main)
