"""Name the YAML key in an error that another package raises."""

from collections.abc import Iterator
from contextlib import contextmanager

from d2v_composer.system.errors import InputError
from d2v_composer.system.retry import reason

__all__ = ["errors_of"]


@contextmanager
def errors_of(key: str) -> Iterator[None]:
    """Turn an error of the block into one line that names a key.

    Raises:
        InputError: The block failed.
    """
    try:
        yield
    except Exception as error:
        raise InputError(f"{key}: {reason(error)}") from error
