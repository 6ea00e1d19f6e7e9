"""Compare the installed packages of loggers with the extras of this package."""

from collections.abc import Iterator, Mapping
from typing import Any

from d2v_composer.system.packages import find_wrong_packages

__all__ = ["needs_of_loggers"]


def needs_of_loggers(loggers: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each chosen logger whose package is missing, or has a version that Composer cannot use.

    Args:
        loggers: Name → arguments; ``None``: off.
    """
    from d2v_composer.callbacks.yaml_names import LOGGERS  # Composer's, which takes seconds to import

    for name, arguments in loggers.items():
        if arguments is not None and name in LOGGERS:
            yield from (f"loggers.{name}: {line}" for line in find_wrong_packages(extra=name))
