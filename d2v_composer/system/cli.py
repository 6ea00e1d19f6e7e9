"""Exit status of a command: 0, 2 with a line for each bad input, 1 with a traceback for other failures."""

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError
from d2v_composer.system.temporary_folder import use_temporary_folder
from d2v_composer.system.worker_lifetime import end_with_launcher

__all__ = ["run"]


def run(main: Callable[[Sequence[str]], Any]) -> NoReturn:
    """Call ``main`` with the command line's arguments, then exit."""
    end_with_launcher()
    try:
        use_temporary_folder()
        main(sys.argv[1:])
    except InputError as error:
        kind = type(error)
        for problem in error.args:
            # A data worker's error has a whole traceback as its message; our message is the last line.
            line = hide_secrets(str(problem).strip().splitlines()[-1])
            print(f"error: {line.removeprefix(f'{kind.__module__}.{kind.__name__}: ')}", file=sys.stderr)
        sys.exit(2)
    except (IsADirectoryError, NotADirectoryError) as error:
        # A folder instead of a file, or a file instead of a folder.
        print(f"error: {error.filename2 or error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0)
