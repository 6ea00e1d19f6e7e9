"""Find the entry points of installed packages."""

from importlib.metadata import EntryPoint, entry_points

from d2v_composer.system.errors import InputError


def find_entry_point(group: str, name: str) -> EntryPoint | None:
    """Return the entry point ``name`` of a group; ``None`` if no installed package has this entry point."""
    entries = [*entry_points(group=group, name=name)]
    if len(entries) > 1:
        offers = sorted(f"{entry.dist.name if entry.dist else 'a package'} ({entry.value})" for entry in entries)
        raise InputError(
            f"{' and '.join(offers)} provide the entry point {name!r} of the group {group}; uninstall all but one"
        )
    return entries[0] if entries else None
