"""Slips in a YAML: each key dropped, misspelt, doubled or moved, and each value replaced by others."""

import copy
import math
import random
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import getitem
from typing import Any, NamedTuple

import yaml

Path = tuple[str, ...]

VALUES: dict[str, Any] = {
    "null": None,
    "nothing": "",
    "a word": "abc",
    "a number as text": "7",
    "a duration": "3ba",
    "a wrong duration": "3xy",
    "true": True,
    "zero": 0,
    "negative": -1,
    "huge": 10**18,
    "beyond 64 bits": 10**30,
    "a fraction": 0.5,
    "tiny": 1e-300,
    "a huge fraction": 1e300,
    "NaN": math.nan,
    "infinite": math.inf,
    "minus infinite": -math.inf,
    "a list": [1, 2, 3],
    "no list": [],
    "NaN in a list": [math.nan, 1.0],
    "a section": {"a": 1},
    "no section": {},
    "an unknown reference": "${nothing}",
    "lines": "a\nb",
    "not ASCII": "é\u202e\u0000",
}
TWIN = "__twin"


class Mutation(NamedTuple):
    """A YAML with one slip."""

    what: str
    path: Path
    """The keys down to the changed one."""
    config: dict[str, Any]
    value: Any = None
    """The new value, if the slip changed one."""

    @property
    def text(self) -> str:
        return yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True).replace(TWIN, "")


def mutations(config: Mapping[str, Any], num: int | None = None, seed: int = 0) -> list[Mutation]:
    """Return the slips in a YAML: ``num`` at random, or all."""
    every = list(_every(config))
    return every if num is None else random.Random(seed).sample(every, min(num, len(every)))


def _every(config: Mapping[str, Any]) -> Iterator[Mutation]:
    for path, value in _paths(config):
        *parents, name = path
        yield Mutation("dropped", path, _changed(config, path, {}))
        for misspelt in dict.fromkeys((name[:-1], name[0] + name[2:] + name[1:2], name.upper(), f"{name}s")):
            if misspelt not in ("", name):
                yield Mutation("misspelt", path, _changed(config, path, {misspelt: value}))
        yield Mutation("doubled", path, _changed(config, path, {name: value, name + TWIN: copy.deepcopy(value)}))
        if parents:
            yield Mutation("moved", path, _changed(config, path, {}, **{name: value}))
        for what, other in VALUES.items():
            yield Mutation(what, path, _changed(config, path, {name: other}), other)


def _paths(config: Mapping[str, Any], above: Path = ()) -> Iterator[tuple[Path, Any]]:
    for name, value in config.items():
        yield (*above, name), value
        if isinstance(value, Mapping):
            yield from _paths(value, (*above, name))


def _changed(config: Mapping[str, Any], path: Path, new: dict[str, Any], **at_top: Any) -> dict[str, Any]:
    """Return the config with ``new`` in place of a key, or beside it if it has the key itself."""
    changed = copy.deepcopy(dict(config))
    section = reduce(getitem, path[:-1], changed)
    if path[-1] not in new:
        del section[path[-1]]
    section.update(new)
    return {**changed, **at_top}
