"""Worker processes that do not outlive the process they work for."""

import multiprocessing
import os
import threading
import time

__all__ = ["end_with_parent"]

POLL_SECONDS = 0.5


def end_with_parent() -> None:
    """Make this worker process end when its parent does, however that happens; elsewhere, and again, do nothing.

    It would go on with what it has, wait for ever for processes that are gone, and hold the locks that it inherited.
    """
    parent = multiprocessing.parent_process()
    if parent is None or any(thread.name == end_with_parent.__name__ for thread in threading.enumerate()):
        return

    started_by = os.getppid()  # the parent, or a server that forks for it

    def watch() -> None:
        # Of a fork, the sentinel is held by its siblings as well.
        while os.getppid() == started_by and parent.is_alive():
            time.sleep(POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name=end_with_parent.__name__, daemon=True).start()
