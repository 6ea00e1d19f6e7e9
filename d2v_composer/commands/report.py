"""Draw a run's report: report.html and report/*.png in the folder of the run.

    d2v report runs/quickstart
    d2v report /mnt/runs/distill

The page needs no other file and no network. Training writes the page at the end; use this command for a run
that is still in progress or was interrupted.
"""

from pathlib import Path

from d2v_composer.commands.command import Command, PlaceHere, Positional
from d2v_composer.system.command_line import print_next


class Report(Command):
    run_folder: Positional[PlaceHere]
    """A run's save_folder, such as runs/quickstart."""

    def run(self) -> list[Path]:
        """Write the report of a run, print its path, and return the paths of the page and the plots."""
        from d2v_composer.report.page import write_report
        from d2v_composer.report.run import read_run

        written = write_report(read_run(self.run_folder), self.run_folder)
        print(f"wrote {written[0]} and {len(written) - 1} plots in {self.run_folder / 'report'}")
        print_next(f"open {written[0].as_uri()}")
        return written


main = Report.main
