"""Warnings of other packages that no user can act on: each with its source and the reason to hide it."""

import os
import sys
import warnings

__all__ = ["hide_foreign_warnings"]


def hide_foreign_warnings() -> None:
    """Hide them in this process and its children."""
    # multiprocessing (Python 3.10 to 3.12): its resource tracker removes what a process that ended without clean-up
    # left in shared memory, and counts it. The tracker takes over this process's options.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    # Composer, of the last batch of an evaluation, which may be smaller than the others.
    warnings.filterwarnings("ignore", "Cannot split tensor of length", UserWarning)
    # torch 2.7's profiler, which the benchmarks use, logs as an error that there is no GPU. 5: nothing.
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
