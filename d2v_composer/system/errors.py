"""Exceptions for unusable input and data."""


class InputError(ValueError):
    """A file, setting or data set that cannot be used, or several of them.

    Each argument is one line that names it and what is allowed. The commands in ``recipes/`` print the lines without a
    traceback and exit with status 2; other exceptions keep their traceback.
    """

    def __str__(self) -> str:
        return "; ".join(map(str, self.args))


class UnreadableImageError(InputError):
    """An image that is missing, corrupt or not an image; others may be readable."""


class ShardError(RuntimeError):
    """A shard cannot be fetched, or is not what the index says."""
