"""Exceptions that a command shows as one line each, and conversions of other exceptions to them."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2v_composer.system.addresses import hide_secrets

# The local disk is full, or the user's share of it.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Package that is not always installed → the extra of d2v-composer that installs it.
EXTRAS = {
    **dict.fromkeys(("boto3", "botocore", "composer", "streaming", "torchmetrics"), "train"),
    **dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "onnx"),
    "pyarrow": "parquet",
    "pycocotools": "detect",
}


class _ShownError(Exception):
    """An error whose lines are shown and recorded; secrets in them are hidden."""

    def __init__(self, *lines: object) -> None:
        super().__init__(*map(hide_secrets, lines))


class InputError(_ShownError, ValueError):
    """Bad input: a file, setting or data set, or several of them. A command prints the lines and exits with status 2.

    Args:
        args: One line per problem, each of which names the bad input and what is allowed.
    """

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


class UnreadableSampleError(InputError):
    """A sample is missing, corrupt or not of a supported format; other samples may be readable."""


class RunError(_ShownError, RuntimeError):
    """A foreseen failure while running, such as a full disk. A command prints the line and exits with status 1."""


class ShardError(RunError):
    """A shard is missing or corrupt, cannot be fetched, or does not match its index."""


def reason(error: BaseException) -> str:
    """Return an error's first line, without secrets; for a missing package, also how to install it."""
    if (extra := find_extra(error)) is not None:
        return f"{error}: pip install 'd2v-composer[{extra}]'"
    lines = str(error).strip().splitlines()
    return hide_secrets(lines[0]) if lines else type(error).__name__


def find_extra(error: BaseException) -> str | None:
    """Return the extra of d2v-composer that installs the package whose import failed; ``None`` if no extra does."""
    return EXTRAS.get((error.name or "").partition(".")[0]) if isinstance(error, ModuleNotFoundError) else None


def find_full_disk(error: BaseException | None) -> OSError | None:
    """Return the full-disk or quota error behind an error, if any: torch's archive writer raises its own error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Convert any exception to one line with the path of the file or folder that the ``with`` block reads.

    Raises:
        InputError: The block raised an exception. An InputError or RunError passes unchanged.
    """
    try:
        yield
    except (InputError, RunError):
        raise
    except Exception as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else reason(error)
        raise InputError(f"{path} cannot be read: {problem}") from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Convert an OSError, or an error behind which is a full disk, to one line with the path that a block writes.

    Raises:
        RunError: The ``with`` block raised such an error. Other errors pass unchanged.
    """
    try:
        yield
    except Exception as error:
        fault = error if isinstance(error, OSError) else find_full_disk(error)
        if fault is None or isinstance(error, RunError):
            raise
        raise RunError(f"{path} cannot be written: {fault.strerror or reason(fault)}") from error


@contextmanager
def errors_of(key: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Convert an error raised in the ``with`` block to one line that names a config key.

    Raises:
        InputError: The block raised an error of the class ``kind``.
    """
    try:
        yield
    except kind as error:
        problem = str(error) if isinstance(error, InputError) else reason(error)
        section = key.partition(".")[0]
        raise InputError(problem if problem.startswith(f"{section}.") else f"{key}: {problem}") from error
