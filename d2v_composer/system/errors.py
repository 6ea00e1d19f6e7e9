"""The exceptions that mean 'your input cannot be used'."""

__all__ = ["InputError", "UnreadableImageError"]


class InputError(ValueError):
    """A file, setting or data set that cannot be used.

    The message is a single line that names the thing and says what is allowed. The commands in ``recipes/`` print
    it without a traceback and exit with status 2; everything else that goes wrong keeps its traceback.
    """


class UnreadableImageError(InputError):
    """One image is absent, damaged or no image; others may well be readable."""
