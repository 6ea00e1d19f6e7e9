"""Draw a run: ``python recipes/report.py RUN_FOLDER`` writes report.html and report/*.png into its folder."""

from d2v_composer.commands.report import main
from d2v_composer.system import command_line

__all__ = ["main"]

if __name__ == "__main__":
    command_line.run(main)
