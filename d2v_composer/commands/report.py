"""Write a run's report into the run's folder: report.html, and the plots as report/*.png.

    d2v report runs/quickstart
    d2v report /mnt/runs/distill

report.html needs no other file and no network. The run may be finished, in progress or interrupted.
"""

from pathlib import Path

from d2v_composer.commands.command import Command, PlaceHere, Positional
from d2v_composer.system.command_line import print_next


class Report(Command):
    run_folder: Positional[PlaceHere]
    """The run's folder on this machine, such as runs/quickstart."""

    def run(self) -> list[Path]:
        """Write the report, and return the paths of the page and of the plots."""
        from d2v_composer.report.page import write_report
        from d2v_composer.report.run import read_run

        written = write_report(read_run(self.run_folder), self.run_folder)
        print(f"wrote {written[0]} and {len(written) - 1} plots in {self.run_folder / 'report'}")
        print_next(f"open {written[0].as_uri()}")
        return written


main = Report.main
