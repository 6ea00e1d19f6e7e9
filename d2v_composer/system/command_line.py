"""Run a command, print one line for each error that a user can mend, and print the next steps."""

import gc
import os
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from d2v_composer.system import processes
from d2v_composer.system.addresses import hide_secrets
from d2v_composer.system.errors import InputError, RunError, find_extra, find_full_disk, reason
from d2v_composer.system.files import shorten_socket_paths

HELP = {"-h", "--help"}


def run(main: Callable[[Sequence[str]], object]) -> NoReturn:
    """Call ``main`` with the command line's arguments, then exit."""
    status: int | None = 0
    try:
        _prepare()
        shorten_socket_paths()
        main(sys.argv[1:])
        sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        if (signum := processes.received()) is not None:
            processes.end_by_signal(signum)
        status, lines = explain(error)
        if status is None:
            raise
        for line in lines:
            print(line, file=sys.stderr)
    finally:
        processes.defer_signals()  # Composer's launcher sends SIGTERM to the last ranks, whose status is decided
        with suppress(AttributeError):  # Windows has neither
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises an error for a worker killed at exit
        gc.freeze()  # at exit, Python would look for garbage among all imports, which takes seconds
    sys.exit(status)


def explain(error: BaseException) -> tuple[int | None, list[str]]:
    """Return an error's exit status and the lines to print; the status is ``None`` if the traceback must be shown."""
    if isinstance(error, InputError | RunError | FloatingPointError):
        # A data worker's error has a whole traceback as its message; our message is the last line.
        lines = [str(problem).strip().splitlines()[-1] for problem in error.args]
        kind = f"{type(error).__module__}.{type(error).__name__}: "
        return 2 if isinstance(error, InputError) else 1, [f"error: {line.removeprefix(kind)}" for line in lines]
    if find_extra(error):
        return 2, [f"error: {reason(error)}"]
    if (fault := find_full_disk(error)) is not None:
        return 1, [f"error: {fault.filename or 'a file'} cannot be written: {fault.strerror}"]
    if isinstance(error, RuntimeError) and "gloo/transport" in str(error):  # a connection to another rank broke
        return 1, ["error: another rank has ended or hangs; look for an error in that rank's output"]
    if isinstance(error, OSError) and error.filename is not None:  # the machine's, such as a file in the way
        return 2, [f"error: {error.filename2 or error.filename}: {error.strerror}"]
    return None, []


def _prepare() -> None:
    """Prepare streams and signals, and hide warnings of other packages that no user can act on."""
    processes.prepare_streams()
    # multiprocessing (Python 3.10 to 3.12): its resource tracker removes what a process that ended without clean-up
    # left in shared memory, and counts it. The tracker takes over this process's options.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    # Composer, of the last batch of an evaluation, which may be smaller than the others.
    warnings.filterwarnings("ignore", "Cannot split tensor of length", UserWarning)
    # Composer, if a run resumes at an epoch's end, whose loader has nothing left. Ours fails if it should have more.
    warnings.filterwarnings("ignore", "No batches were trained", UserWarning)
    processes.handle_signals()


def begin(text: str | None) -> None:
    """Prepare a recipe before its slow imports: print ``text`` for ``--help``, and let Ctrl-C end the imports."""
    _prepare()
    if HELP & {*sys.argv[1:]}:
        run(lambda argv: show_help(argv, text))


def show_help(argv: Sequence[str], text: str | None) -> None:
    """Print ``text`` and exit if ``argv`` has ``-h`` or ``--help``."""
    if HELP & {*argv}:
        print(text)
        sys.exit(0)


def print_next(*steps: str) -> None:
    """Print the next steps on rank 0, one per line, without secrets."""
    if processes.global_rank() == 0:
        print("\n".join(f"next: {hide_secrets(step)}" for step in steps), flush=True)


def print_skipped(reasons: Sequence[str]) -> None:
    """Print how many samples were skipped as unreadable, and the reason for each."""
    print("\n  ".join([f"skipped as unreadable: {len(reasons) or 'none'}", *reasons]))


def training(yaml: str, *changes: str) -> tuple[str, str]:
    """Return two command lines: the first writes the package's ``yaml`` to a file, the second trains with the file."""
    return f"{d2v('init', yaml)} > {yaml}.yaml", d2v("train", f"{yaml}.yaml", *changes)


def training_on(out: str, yaml: str) -> tuple[str, str]:
    """Return the command lines of :func:`training` on the data set at ``out``, a folder or an address."""
    return training(yaml, f"train_loader.remote={out}" if "://" in out else f"train_loader.local={out}")


def reading_of(out: str) -> str:
    """Return a line of Python that reads the embeddings in ``out``, a .npy or .parquet file."""
    table = f"pandas.read_parquet({out!r})" if out.endswith(".parquet") else f"numpy.load({out!r}, mmap_mode='r')"
    return f"import {table.partition('.')[0]}; embeddings = {table}"


def d2v(*arguments: str | Path) -> str:
    """Return a command line of d2v that can be run in the current folder."""
    script = Path(sys.executable).with_name("d2v")
    # Without a script beside it, as pip's --user and Windows have it, d2v is on the PATH.
    is_on_path = shutil.which("d2v") == str(script) or not script.exists()
    program = "d2v" if is_on_path else min(os.path.relpath(script), str(script), key=len)
    return shlex.join([program, *map(str, arguments)])
