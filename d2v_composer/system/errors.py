"""Exceptions for unusable input."""

__all__ = ["InputError", "UnreadableImageError"]


class InputError(ValueError):
    """A file, setting or data set that cannot be used.

    The message is one line that names it and what is allowed. The commands in ``recipes/`` print the message without a
    traceback and exit with status 2; other exceptions keep their traceback.
    """


class UnreadableImageError(InputError):
    """An image that is missing, corrupt or not an image; others may be readable."""
