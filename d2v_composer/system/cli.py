"""Exit status of a command: 0, 2 with one line for bad input, 130 with one after Ctrl-C, 1 with a traceback."""

import gc
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from d2v_composer.system import interrupts
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError
from d2v_composer.system.temporary_folder import use_temporary_folder
from d2v_composer.system.worker_lifetime import end_with_launcher, end_workers

__all__ = ["run"]


def run(main: Callable[[Sequence[str]], Any]) -> NoReturn:
    """Call ``main`` with the command line's arguments, then exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # in a pipe too
    interrupts.handle_interrupts()
    end_with_launcher()
    status = 0
    try:
        use_temporary_folder()
        main(sys.argv[1:])
    except BaseException as error:
        status = explain(error)
        if status is None:
            raise
    finally:
        gc.freeze()  # at exit, Python would look for garbage among all imports, which takes seconds
    sys.exit(status)


def explain(error: BaseException) -> int | None:
    """Print one line and return the exit status; ``None`` for an error that needs its traceback."""
    if interrupts.was_interrupted():
        end_workers()
        said = error.args if isinstance(error, KeyboardInterrupt) else ()
        return _print_and_return(interrupts.EXIT_STATUS, ": ".join(["Interrupted", *said]))
    if isinstance(error, InputError):
        # A data worker's error has a whole traceback as its message; our message is the last line.
        line = hide_secrets(str(error).strip().splitlines()[-1])
        kind = type(error)
        return _print_and_return(2, f"error: {line.removeprefix(f'{kind.__module__}.{kind.__name__}: ')}")
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        # A folder instead of a file, or a file instead of a folder.
        return _print_and_return(2, f"error: {error.filename2 or error.filename}: {error.strerror}")
    return None


def _print_and_return(status: int, line: str) -> int:
    print(line, file=sys.stderr)
    return status
