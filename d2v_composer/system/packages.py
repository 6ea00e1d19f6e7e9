"""Compare the installed packages with what this package and its extras need."""

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

__all__ = ["find_wrong_packages", "install_command"]


def find_wrong_packages(extra: str = "") -> Iterator[str]:
    """Yield a line for each package that is missing or has another version, with the command that installs it.

    Args:
        extra: Look at what this extra adds; default: at what every installation needs.
    """
    for wanted in requirements_of(extra):
        install = install_command(extra, wanted.name)
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield f"needs the package {wanted.name}: {install}"
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            yield f"does not work with {wanted.name} {version}: {install}"


def install_command(extra: str, *names: str) -> str:
    """Return the command that installs these packages of an extra.

    pip cannot find an extra of this package, which is in no index.
    """
    wanted = (f"'{each.name}{each.specifier}'" for each in requirements_of(extra) if each.name in names)
    return f"pip install {' '.join(wanted)}"


def requirements_of(extra: str) -> Iterator[Requirement]:
    """Yield what an extra of this package adds, nothing if there is no such extra; '' is the package itself."""
    for line in metadata.requires("d2v-composer") or []:
        requirement = Requirement(line)
        marker = requirement.marker
        in_all = marker is None or marker.evaluate({"extra": ""})
        if in_all if not extra else marker is not None and not in_all and marker.evaluate({"extra": extra}):
            yield requirement
