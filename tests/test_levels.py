"""The house stays in order: imports go down, modules keep their private names, and files and functions stay short."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from helpers import ROOT

# A room imports from rooms on lower levels only, and rooms on one level do not know each other.
LEVELS = [
    ("system",),
    ("models",),
    ("checkpoints", "data"),
    ("embedding.py", "evaluation"),
    ("callbacks",),
    ("report", "config"),
    ("builders",),
    ("preflight.py", "benchmarks"),
    ("d2v_composer/__init__.py",),
    ("commands",),
    ("recipes",),
]
LEVEL_OF_ROOM = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MAX_LINES_OF_FILE, MAX_LINES_OF_FUNCTION = 1000, 80


class Import(NamedTuple):
    """``from source import name``, or ``import source`` with an empty name."""

    importer: str
    line: int
    source: str
    name: str


def find_modules() -> dict[str, Path]:
    """Map the name of each module of the package and the recipes to its file."""
    paths = [path for folder in ("d2v_composer", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


MODULES = find_modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def find_imports() -> Iterator[Import]:
    """Yield every import of one of our modules, inside functions too."""
    for importer, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{importer}:{node.lineno}: a relative import"
                found = [(node.module or "", alias.name) for alias in node.names]
            else:
                continue
            for module, name in found:
                if f"{module}.{name}" in MODULES:  # from package import module
                    module, name = f"{module}.{name}", ""
                if module in MODULES:
                    yield Import(importer, node.lineno, module, name)


def level_of(module: str) -> tuple[int, str]:
    package, _, rest = module.partition(".")
    room = "recipes" if package == "recipes" else rest.partition(".")[0] or "d2v_composer/__init__.py"
    room = f"{room}.py" if room in ("embedding", "preflight") else room
    return LEVEL_OF_ROOM[room], room


def test_imports_go_down() -> None:
    upward = []
    for each in find_imports():
        (level, room), (level_below, room_below) = level_of(each.importer), level_of(each.source)
        if room != room_below and level <= level_below:
            upward.append(f"{each.importer}:{each.line} imports {each.source}")
    assert not upward, "\n".join(upward)


def test_no_modules_import_each_other() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for each in find_imports():
        graph[each.importer].add(each.source)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {' → '.join(error.args[1])}") from None


def test_private_names_stay_in_their_module() -> None:
    private = [
        f"{each.importer}:{each.line} imports {each.source}.{each.name}"
        for each in find_imports()
        if each.name.startswith("_") or each.source.rpartition(".")[2].startswith("_")
    ]
    assert not private, "\n".join(private)


def test_files_and_functions_are_short() -> None:
    long = []
    for name, path in MODULES.items():
        num_lines = len(path.read_text().splitlines())
        if num_lines > MAX_LINES_OF_FILE:
            long.append(f"{path.relative_to(ROOT)}: {num_lines} lines, at most {MAX_LINES_OF_FILE}")
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > MAX_LINES_OF_FUNCTION:
                    long.append(f"{name}.{node.name}: {size} lines, at most {MAX_LINES_OF_FUNCTION}")
    assert not long, "\n".join(long)
