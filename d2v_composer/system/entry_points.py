"""Find the entry points of installed packages."""

from importlib.metadata import EntryPoint, entry_points

from d2v_composer.system.errors import InputError


def find_entry_point(group: str, name: str) -> EntryPoint | None:
    """Return the entry point ``name`` of a group that an installed package offers; ``None`` if no package offers it.

    Raises:
        InputError: Several packages offer it. Which of them Python finds first depends on the order of ``sys.path``.
    """
    entries = [*entry_points(group=group, name=name)]
    if len(entries) > 1:
        offers = sorted(f"{entry.dist.name if entry.dist else 'a package'} ({entry.value})" for entry in entries)
        raise InputError(f"{' and '.join(offers)} offer {name!r} in {group}; uninstall all but one")
    return entries[0] if entries else None
