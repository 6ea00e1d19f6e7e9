"""Handle a command's signals, child processes and open files, and the ranks and parts that share its work."""

import ctypes
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import popen_fork, resource_tracker
from typing import Any, NamedTuple, TextIO, TypeVar

from typing_extensions import Buffer, Self

from d2v_composer.system.errors import RunError

T = TypeVar("T")
SIGNAL_NAMES = {signal.SIGINT: "Interrupted", signal.SIGTERM: "SIGTERM"}
PR_SET_PDEATHSIG = 1
STDOUT = 1

_is_watching = False
_received: signal.Signals | None = None
_is_deferred = False
_notice: str | None = None
_explanations: list[Callable[[], str | None]] = []
Handlers = dict[signal.Signals, Any]  # what signal.signal returns has no public type
_previous: Handlers = {}


# A command blocks SIGINT and SIGTERM in its first line. All its threads and children inherit this signal mask, so that
# no signal to the whole process group, which schedulers and terminals send, reaches a data worker or an upload. One
# thread awaits the signals. On Windows, which has no masks, handlers replace the thread; commands have no children
# there.
# A rank also receives SIGTERM when Composer's launcher dies.
def handle_signals() -> None:
    """From now on, exit on SIGINT or SIGTERM with status 130 or 143, unless :func:`defer_signals` is called.

    Call this function before imports that start threads. A signal that this process ignores stays ignored.
    """
    global _is_watching
    if _is_watching:
        return
    _is_watching = True
    if not hasattr(signal, "pthread_sigmask"):
        _set_handlers()
        return
    resource_tracker.ensure_running()  # a later start would unblock the signals
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNAL_NAMES)
    # Children inherit the mask: SIGTERM would not end them, and multiprocessing would wait for them for ever at exit.
    popen_fork.Popen.terminate = popen_fork.Popen.kill
    threading.Thread(target=_watch, args=(_not_ignored(),), daemon=True).start()
    # A shell or nohup that started a rank may end before it.
    if is_launched():
        import psutil  # only then: it takes a twentieth of a second

        if "composer" in " ".join(psutil.Process(os.getppid()).cmdline()):
            _at_parents_death(signal.SIGTERM)


def received() -> signal.Signals | None:
    """Return the first signal that arrived; ``None`` if there was none."""
    return _received


def defer_signals(notice: str | None = None) -> None:
    """From now on, only record the first signal, which :func:`received` returns; a later Ctrl-C ends the process.

    Args:
        notice: Text that rank 0 prints if the first signal is Ctrl-C.
    """
    global _is_deferred, _notice
    if not (_is_deferred or _is_watching):  # a program of somebody else's, which has its own handlers
        _previous.update(_set_handlers())
    _is_deferred, _notice = True, notice


def obey_signals() -> None:
    """Stop deferring signals, and exit now if a signal has arrived."""
    global _is_deferred
    _is_deferred = False
    _restore_handlers()
    if _received is not None:
        end_by_signal(_received)


def forget_signals() -> None:
    """Forget a recorded signal and restore the former handlers, except in a command."""
    global _is_deferred, _received
    if not _is_watching:
        _restore_handlers()
        _is_deferred, _received = False, None


def _restore_handlers() -> None:
    while _previous:
        signal.signal(*_previous.popitem())


@contextmanager
def if_interrupted(explain: Callable[[], str | None]) -> Iterator[None]:
    """If :func:`end_by_signal` ends the process in the ``with`` block, print the text that ``explain`` returns.

    Args:
        explain: Function that returns the text to print after the signal's name, or ``None``; it may clean up, and may
            run in another thread.
    """
    _explanations.append(explain)
    try:
        yield
    finally:
        _explanations.remove(explain)


def end_by_signal(signum: signal.Signals) -> None:
    """Print the signal's name and the texts of :func:`if_interrupted`, kill the children, and exit immediately."""
    explanations = [explain() for explain in reversed(_explanations)]
    _end(": ".join([SIGNAL_NAMES[signum], *filter(None, explanations)]))


def _set_handlers() -> Handlers:
    """Set the handlers of the signals, and return the former handlers."""
    return {signum: signal.signal(signum, lambda number, _: _receive(number)) for signum in _not_ignored()}


def _not_ignored() -> list[signal.Signals]:
    return [signum for signum in SIGNAL_NAMES if signal.getsignal(signum) is not signal.SIG_IGN]


def _watch(signals: list[signal.Signals]) -> None:
    while True:
        _receive(signal.sigwait(signals))


def _receive(number: int) -> None:
    global _received
    if _received is None:
        _received = signal.Signals(number)
        if not _is_deferred:
            # In a thread, so that a second Ctrl-C is heard meanwhile.
            threading.Thread(target=end_by_signal, args=(_received,), daemon=True).start()
        elif _notice is not None and _received == signal.SIGINT and global_rank() == 0:
            _print(_notice, sys.stdout)
    elif number == signal.SIGINT:  # Composer's launcher sends SIGTERM right after the first Ctrl-C
        _end("Interrupted again: exiting immediately")


def _end(line: str) -> None:
    _print(line, sys.stderr)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(128 + (_received or signal.SIGINT))


def _print(line: str, stream: TextIO) -> None:
    """Print a line over a progress bar, even if the main thread is printing."""
    with suppress(OSError, ValueError):  # a killed launcher may have closed the terminal
        clear = "\r\033[K" if stream.isatty() else ""
        os.write(stream.fileno(), f"{clear}{line}\n".encode())


def die_with_parent() -> None:
    """Let Linux kill this process when its parent ends, or the parent's thread that started this process."""
    _at_parents_death(signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # the parent died before this call
        os._exit(1)


def start_program(arguments: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Start a program in its own session, with no signals blocked; on Linux, the program dies with this process."""

    def prepare() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        die_with_parent()

    return subprocess.Popen(arguments, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=prepare, **options)


def _at_parents_death(signum: signal.Signals) -> None:
    with suppress(AttributeError):  # macOS
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signum)


def allow_open_files() -> None:
    """Raise the limit of open files to the hard limit."""
    import resource  # Windows has none, and does not train

    # Each tensor that a data worker has ready is an open file.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError):  # macOS: no limit, which it does not accept
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Output(io.FileIO):
    """An output stream that becomes /dev/null, also for child processes, when a write fails."""

    def write(self, data: Buffer, /) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            _discard(self.fileno())
            if self.fileno() == STDOUT and not isinstance(error, BrokenPipeError):  # it was to keep the results
                raise RunError(f"standard output cannot be written: {error.strerror}") from error
            return super().write(data)


def _discard(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, descriptor)
    if null != descriptor:
        os.close(null)


def prepare_streams() -> None:
    """Set up the standard streams: each line appears at once, and closed streams or readers that exit do no harm.

    A print raises a RunError if standard output is a file and its disk is full.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # else a file of ours would take its number, and what others print
            _discard(descriptor)
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w", closefd=False))
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream.isatty():  # prints each line; on Windows, needs its own encoding
            continue
        with suppress(OSError):  # replaced by something without a file
            output = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
            stream.flush()
            setattr(sys, name, io.TextIOWrapper(output, stream.encoding, "backslashreplace", line_buffering=True))


# The first rank of a node may start this much later than the others.
REPORT_SECONDS = 30.0


def is_launched() -> bool:
    """Return True if a launcher, such as Composer's or torchrun, started this process."""
    return "LOCAL_RANK" in os.environ


def relaunch_on_gpus(*arguments: str) -> None:
    """With several GPUs and no launcher, replace this process with Composer's launcher, which runs d2v on each GPU."""
    import torch

    if is_launched() or torch.cuda.device_count() < 2:
        return
    import composer.cli  # noqa: F401  (if it is missing, this error says what to install, the launcher's does not)

    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM])  # the launcher would inherit the mask
    program = [sys.executable, "-m", "composer.cli", "-m", "d2v_composer.commands"]
    os.execv(sys.executable, [*program, *arguments])


def global_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_ranks() -> int:
    """Return the number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def num_nodes() -> int:
    """Return the number of machines in the run."""
    return num_ranks() // local_ranks()


def let_first_rank_report() -> None:
    """Let only the first rank of this node report an error that all its ranks found: the other ranks wait."""
    # When the first rank has ended, Composer's launcher ends the others, before they print the error as well.
    if local_rank() != 0:
        # The launcher prints nothing of a process that the signal killed.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        time.sleep(REPORT_SECONDS)


class Part(NamedTuple):
    """A part of work that is divided among machines."""

    number: int
    """Index of the part."""
    total: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse I/N, the part with index I of N parts."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and int(number) < int(count) <= 100_000):
            raise ValueError(f"must be I/N with 0 <= I < N <= 100,000, got {text!r}")
        return cls(int(number), int(count))

    @property
    def name(self) -> str:
        return f"{self.number:05}-of-{self.total:05}"

    def of(self, items: list[T]) -> list[T]:
        """Return this part of a list."""
        first, end = (len(items) * number // self.total for number in (self.number, self.number + 1))
        return items[first:end]


ALL = Part(0, 1)
