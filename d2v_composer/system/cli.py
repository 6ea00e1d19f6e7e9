"""Exit status of a command: 0; 2 with a line for each bad input; 130 or 143 after a signal; 1 with a traceback."""

import gc
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from d2v_composer.system import interrupts
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.closed_pipes import survive_closed_pipes
from d2v_composer.system.errors import InputError
from d2v_composer.system.foreign_warnings import hide_foreign_warnings
from d2v_composer.system.temporary_folder import use_temporary_folder
from d2v_composer.system.worker_lifetime import end_with_launcher, end_workers

__all__ = ["begin", "run", "show_help"]


def run(main: Callable[[Sequence[str]], Any]) -> NoReturn:
    """Call ``main`` with the command line's arguments, then exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # in a pipe too
    hide_foreign_warnings()
    survive_closed_pipes()
    interrupts.handle_interrupts()
    end_with_launcher()
    status = 0
    try:
        use_temporary_folder()
        main(sys.argv[1:])
    except BaseException as error:
        status, lines = explain(error)
        if status is None:
            raise
        for line in lines:
            print(line, file=sys.stderr)
    finally:
        interrupts.keep_status()
        gc.freeze()  # at exit, Python would look for garbage among all imports, which takes seconds
    sys.exit(status)


def explain(error: BaseException) -> tuple[int | None, list[str]]:
    """Return the exit status and the lines to print; the status ``None`` for an error that needs its traceback."""
    if (signum := interrupts.received()) is not None:
        end_workers()
        said = error.args if isinstance(error, KeyboardInterrupt) else ()
        return interrupts.status(signum), [": ".join([interrupts.NAMES[signum], *said])]
    if isinstance(error, InputError):
        # A data worker's error has a whole traceback as its message; our message is the last line.
        found = [hide_secrets(str(problem).strip().splitlines()[-1]) for problem in error.args]
        kind = f"{type(error).__module__}.{type(error).__name__}: "
        return 2, [f"error: {line.removeprefix(kind)}" for line in found]
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        # A folder instead of a file, or a file instead of a folder.
        return 2, [f"error: {error.filename2 or error.filename}: {error.strerror}"]
    return None, []


def begin(text: str | None) -> None:
    """Begin a recipe whose imports take seconds: answer ``--help``, and let Ctrl-C end the imports."""
    show_help(sys.argv[1:], text)
    interrupts.end_at_interrupt()


def show_help(argv: Sequence[str], text: str | None) -> None:
    """Print a command's help and exit, if ``--help`` asks for it; a command that takes a YAML has no parser."""
    if not {"-h", "--help"}.isdisjoint(argv):
        print(text)
        sys.exit(0)
