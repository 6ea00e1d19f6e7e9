"""Draw a run: ``python recipes/report.py RUN_FOLDER`` writes report.html and report/*.png into its folder.

The page needs no other file and no network. Training writes it at its end; use this command for a run that is still
running or was interrupted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from d2v_composer.report.page import write_report
from d2v_composer.report.run import read_run


def main(argv: Sequence[str]) -> list[Path]:
    """Write the report of a run, and print its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="RUN_FOLDER", type=Path, help="a run's save_folder, such as runs/quickstart")
    folder = parser.parse_args(argv).folder
    written = write_report(read_run(folder), folder)
    print(f"wrote {written[0]} and {len(written) - 1} plots in {folder / 'report'}")
    return written
