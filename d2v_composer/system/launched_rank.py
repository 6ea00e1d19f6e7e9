"""This process's place among a run's, as Composer's launcher puts it in the environment; no Composer is imported."""

import os
import signal
import time

__all__ = ["REPORT_SECONDS", "global_rank", "is_one_node", "let_first_rank_report", "num_ranks"]

# The first rank of a node may start so much later than the others.
REPORT_SECONDS = 30.0


def global_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_one_node() -> bool:
    return num_ranks() == int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def let_first_rank_report() -> None:
    """Give the first rank of this node time to report an error that all of its ranks have found, before they joined.

    When it has ended, Composer's launcher ends the others by SIGTERM, so that they do not print the error as well.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the launcher prints nothing of a process that the signal killed
        time.sleep(REPORT_SECONDS)
