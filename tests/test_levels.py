"""Imports go down, private names stay in their module, and files and functions stay short."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from helpers import ROOT

# A folder imports from folders on lower levels only, and folders on one level do not import each other.
LEVELS = [
    ("system",),
    ("models",),
    ("checkpoints", "data", "objectives"),
    ("sources",),
    ("conversion", "evaluation"),
    ("config",),
    ("callbacks", "embedding", "report", "training_data"),
    ("export", "runs"),
    ("d2v_composer/__init__.py", "timm_models"),
    ("commands",),
    ("recipes",),
]
LEVEL_OF_ROOM = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
MAX_LINES_OF_FILE, MAX_LINES_OF_FUNCTION = 600, 60  # of a function without its docstring


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
        for line, module, name in imported(tree):
            if f"{module}.{name}" in MODULES:  # from package import module
                module, name = f"{module}.{name}", ""
            if module in MODULES:
                yield Import(importer, line, module, name)


def imported(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Yield line, module and name of each import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert not getattr(node, "level", 0), f"line {node.lineno}: a relative import"
            yield from ((node.lineno, *((module, alias.name) if module else (alias.name, ""))) for alias in node.names)


def level_of(module: str) -> tuple[int, str]:
    package, _, rest = module.partition(".")
    room = "recipes" if package == "recipes" else rest.partition(".")[0] or "d2v_composer/__init__.py"
    return LEVEL_OF_ROOM[room], room


def test_imports_go_down() -> None:
    upward = []
    for statement in find_imports():
        (level, room), (level_below, room_below) = level_of(statement.importer), level_of(statement.source)
        if room != room_below and level <= level_below:
            upward.append(f"{statement.importer}:{statement.line} imports {statement.source}")
    assert not upward, "\n".join(upward)


def test_no_modules_import_each_other() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for statement in find_imports():
        graph[statement.importer].add(statement.source)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {' → '.join(error.args[1])}") from None


def test_private_names_stay_in_their_module() -> None:
    private = [
        f"{statement.importer}:{statement.line} imports {statement.source}.{statement.name}"
        for statement in find_imports()
        if statement.name.startswith("_") or statement.source.rpartition(".")[2].startswith("_")
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
                docstring = node.body[0] if ast.get_docstring(node) else None
                size = (node.end_lineno or 0) - node.lineno + 1
                if docstring is not None:
                    size -= (docstring.end_lineno or 0) - docstring.lineno + 1
                if size > MAX_LINES_OF_FUNCTION:
                    long.append(f"{name}.{node.name}: {size} lines, at most {MAX_LINES_OF_FUNCTION}")
    assert not long, "\n".join(long)


def test_the_promises_import_no_module_of_the_package() -> None:
    """Imports of their helpers count too; the package's own names are public."""
    tests = ROOT / "tests"
    left, seen, internal = sorted((tests / "promises").glob("*.py")), set(), []
    left.append(tests / "shared_fixtures.py")
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        for _, name, _ in imported(ast.parse(path.read_text())):
            is_public = not name.startswith("d2v_composer.") or name == "d2v_composer.timm_models"
            internal += [] if is_public else [f"{path.name} imports {name}"]
            files = [folder / f"{name.replace('.', '/')}.py" for folder in (tests, path.parent)]
            left += [file for file in files if file.is_file()]
    assert tests / "helpers.py" in seen
    assert tests / "programs" / "preloaded.py" in seen
    assert not internal, "\n".join(internal)
