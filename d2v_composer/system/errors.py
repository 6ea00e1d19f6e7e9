"""Exceptions that a command prints without a traceback, and conversions of other exceptions to them."""

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
    """An error that hides the secrets in its lines."""

    def __init__(self, *lines: object) -> None:
        super().__init__(*map(hide_secrets, lines))


class InputError(_ShownError, ValueError):
    """Bad input, such as a corrupt file or a wrong setting; a command prints the lines and exits with status 2.

    Args:
        args: One line for each problem.
    """

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


class UnreadableSampleError(InputError):
    """A sample is missing, corrupt or not of a supported format."""


class RunError(_ShownError, RuntimeError):
    """A foreseen failure while running, such as a full disk; a command prints its text and exits with status 1."""


class ShardError(RunError):
    """A shard is missing or corrupt, cannot be fetched, or does not match its index."""


def reason(error: BaseException) -> str:
    """Return an error's first line without secrets; for a missing package, also the extra that installs the package."""
    if (extra := find_extra(error)) is not None:
        return f"{error}: pip install 'd2v-composer[{extra}]'"
    lines = str(error).strip().splitlines()
    return hide_secrets(lines[0]) if lines else type(error).__name__


def find_extra(error: BaseException) -> str | None:
    """Return the extra of d2v-composer that installs the package whose import failed; ``None`` if no extra does."""
    return EXTRAS.get((error.name or "").partition(".")[0]) if isinstance(error, ModuleNotFoundError) else None


def find_full_disk(error: BaseException | None) -> OSError | None:
    """Return the full-disk or quota error among an error and its causes; ``None`` if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return error
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Convert an error of the ``with`` block, which reads ``path``, to an InputError that names ``path``.

    Raises:
        InputError: The block raised any exception but a RunError; an InputError passes unchanged.
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
    """Convert an OSError of the ``with`` block, which writes ``path``, to a RunError that names ``path``."""
    try:
        yield
    except Exception as error:
        fault = error if isinstance(error, OSError) else find_full_disk(error)
        if fault is None or isinstance(error, RunError):
            raise
        raise RunError(f"{path} cannot be written: {fault.strerror or reason(fault)}") from error


@contextmanager
def errors_of(key: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Convert an error of the ``with`` block to an InputError that names ``key``, a config key or a file."""
    try:
        yield
    except kind as error:
        problem = str(error) if isinstance(error, InputError) else reason(error)
        section = key.partition(".")[0]
        raise InputError(problem if problem.startswith(f"{section}.") else f"{key}: {problem}") from error
