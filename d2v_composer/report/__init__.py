"""Draw a run: one HTML file that needs no network, and its plots as PNG files."""

from d2v_composer.report.page import write_report
from d2v_composer.report.run import Run, read_run

__all__ = ["Run", "read_run", "write_report"]
