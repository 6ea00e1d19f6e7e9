"""Slips in a YAML: each key dropped, misspelt, doubled or moved, and each value replaced by others."""

import copy
import math
import random
from collections.abc import Iterator, Mapping
from types import MappingProxyType
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
    config: Mapping[str, Any]
    """The YAML's keys and values without the slip."""
    in_section: Mapping[str, Any] = MappingProxyType({})
    """What the changed key's section gets in its place, or beside it if it has the key itself."""
    at_top: Mapping[str, Any] = MappingProxyType({})

    @property
    def value(self) -> Any:
        """The new value, if the slip changed one."""
        return self.in_section.get(self.path[-1])

    @property
    def is_value(self) -> bool:
        return self.what in VALUES

    @property
    def text(self) -> str:
        changed = copy.deepcopy(dict(self.config))
        section = _get(changed, self.path[:-1])
        if self.path[-1] not in self.in_section:
            del section[self.path[-1]]
        section.update(self.in_section)
        return _dump({**changed, **self.at_top}).replace(TWIN, "")


def mutations(config: Mapping[str, Any], num: int | None = None, seed: int = 0) -> list[Mutation]:
    """Return the slips in a YAML: ``num`` at random, or all."""
    every = list(_every(config))
    return every if num is None else random.Random(seed).sample(every, min(num, len(every)))


def _every(config: Mapping[str, Any]) -> Iterator[Mutation]:
    for path in _paths(config):
        *parents, name = path
        value = _get(config, path)
        yield Mutation("dropped", path, config)
        for misspelt in dict.fromkeys((name[:-1], name[0] + name[2:] + name[1:2], name.upper(), f"{name}s")):
            if misspelt not in ("", name):
                yield Mutation("misspelt", path, config, {misspelt: value})
        yield Mutation("doubled", path, config, {name: value, name + TWIN: copy.deepcopy(value)})
        if parents:
            yield Mutation("moved", path, config, at_top={name: value})
        for what, other in VALUES.items():
            yield Mutation(what, path, config, {name: other})


def _paths(config: Mapping[str, Any], above: Path = ()) -> Iterator[Path]:
    for name, value in config.items():
        yield (*above, name)
        if isinstance(value, Mapping):
            yield from _paths(value, (*above, name))


def _get(config: Mapping[str, Any], path: Path) -> Any:
    for name in path:
        config = config[name]
    return config


def _dump(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
