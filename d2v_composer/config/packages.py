"""Compare the installed packages of loggers with the extras of this package."""

from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

__all__ = ["needs_of_loggers"]


def needs_of_loggers(loggers: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each chosen logger whose package is missing, or has a version that Composer cannot use.

    Args:
        loggers: Name → arguments; ``None``: off.
    """
    from d2v_composer.callbacks.yaml_names import LOGGERS  # Composer's, which takes seconds to import

    for name, arguments in loggers.items():
        if arguments is None or name not in LOGGERS:
            continue
        for wanted in requirements_of(extra=name):
            install = f"pip install '{wanted.name}{wanted.specifier}'"
            try:
                version = metadata.version(wanted.name)
            except metadata.PackageNotFoundError:
                yield f"loggers.{name}: needs the package {wanted.name}: {install}"
                continue
            if not wanted.specifier.contains(version, prereleases=True):
                yield f"loggers.{name}: does not work with {wanted.name} {version}: {install}"


def requirements_of(extra: str) -> Iterator[Requirement]:
    """Yield what an extra of this package adds; nothing if there is no such extra."""
    for line in metadata.requires("d2v-composer") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}):
            yield requirement
