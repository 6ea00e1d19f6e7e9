"""Write the generated pages again: ``python tests/reference.py``.

They are the fields in yamls/README.md, from ``d2v fields``; recipes/guides/commands.md, from each ``--help``; and the
containers in recipes/guides/sources.md.
``python tests/reference.py FOLDER`` writes HTML of the public names there, with pdoc.
"""

import ast
import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import d2v_composer
import d2v_composer.callbacks
from d2v_composer.commands.command import Command
from d2v_composer.sources import CONTAINERS

ROOT = Path(__file__).parent.parent
FIELDS, COMMANDS = ROOT / "yamls" / "README.md", ROOT / "recipes" / "guides" / "commands.md"
# Module → its public names.
PUBLIC = {
    "d2v_composer": d2v_composer.__all__,
    "d2v_composer.timm_models": ["d2v2_student"],
    "d2v_composer.callbacks": list(d2v_composer.callbacks.MODULES),
    "d2v_composer.models.teacher": ["Teacher"],
    "d2v_composer.models.student": ["Student"],
    "d2v_composer.models.backbone": ["Backbone", "Transformer"],
    "d2v_composer.models.configs": ["TargetOptions"],
    "d2v_composer.models.targets": ["LayerMean"],
    "d2v_composer.objectives.objective": ["Regression"],
}
# Lines of a docstring such as 'step: images/s'.
ITEMS = re.compile("(?:^[a-z-]+: .*\\n){2,}", re.MULTILINE)
SOURCES = ROOT / "recipes" / "guides" / "sources.md"
BEGIN, END = "<!-- python tests/reference.py writes what follows -->\n\n", "\n\n<!-- the end of d2v fields -->\n"
ABOUT = """# Commands

`python tests/reference.py` writes this page from each command's `--help`.

`d2v NAME` runs wherever the package is installed, also as `python -m d2v_composer.commands NAME`; `recipes/` needs a
clone. Most commands end by naming the next command. Exit status: 0; 2 with a line per bad input; 1 with a line for a
failure while running; 130 after Ctrl-C, 143 after SIGTERM.
"""


def find_command(file: str) -> type[Command] | None:
    """Return the class of a command; ``None`` if its arguments are a YAML's."""
    module = import_module(file.removesuffix(".py").replace("/", "."))
    own = vars(module).get(Path(file).stem.title().replace("_", ""))
    return own if isinstance(own, type) and issubclass(own, Command) else None


def fields_page() -> str:
    """Return yamls/README.md with today's tables."""
    from d2v_composer.commands.fields import find_tables

    before, rest = FIELDS.read_text().split(BEGIN)
    return before + BEGIN + "\n\n".join(text for *_, text in find_tables()) + END + rest.split(END)[1]


def sources_page() -> str:
    """Return recipes/guides/sources.md with a row for each container."""
    begin = re.escape("| a folder | path |") + r".*\n"
    rows = "".join(
        f"| {kind.plural}: `FILE{kind.suffix}`, a folder, `'data/*{kind.suffix}'` | `{kind.ids}` | {kind.samples}; "
        + (f"`--label-column`: {kind.labels}" if kind.labels else "classes and splits are folders in it")
        + " |\n"
        for kind in CONTAINERS
    )
    return re.sub(rf"({begin})(?s:.*?)(\| `hf:)", lambda match: match[1] + rows + match[2], SOURCES.read_text())


def commands_page() -> str:
    """Return recipes/guides/commands.md."""
    from d2v_composer.commands import __main__ as d2v

    ours = {f"d2v {name}": f"d2v_composer/commands/{name.replace('-', '_')}.py" for name in d2v.COMMANDS}
    recipes = {f"recipes/{path.name}": f"recipes/{path.name}" for path in sorted((ROOT / "recipes").glob("*.py"))}
    return "\n".join([ABOUT, *(line for item in {**ours, **recipes}.items() for line in describe(*item))])


def describe(command: str, file: str) -> Iterator[str]:
    """Yield the lines of a command: what it does, examples, arguments."""
    source = (ROOT / file).read_text()
    text = f"{ast.get_docstring(ast.parse(source))}\n"
    text = re.sub(r"\n\n((?:    .*\n)+)", lambda examples: f"\n\n```sh\n{dedent(examples[1])}```\n", text)
    text = re.sub("(?<!`)``(?!`)", "`", re.sub("usage: (.*)", r"`\1`", text))
    text = re.sub(ITEMS, lambda items: re.sub("^", "- ", items[0].strip(), flags=re.MULTILINE) + "\n\n", text)
    yield f"## {command}\n\n{text}"
    # Other recipes import Composer, and have no options that their text does not name.
    if command.startswith("d2v") or "ablations" in command:
        kind = find_command(file)
        yield from table(kind) if kind is not None else ()


def table(kind: type[Command]) -> Iterator[str]:
    """Yield the table of a command's arguments."""
    rows = []
    for action in kind.add_arguments(ArgumentParser()).values():
        words = [*action.option_strings, *([] if action.nargs == 0 else [str(action.metavar)])]
        needed = "Required. " if action.required and action.option_strings else ""
        rows.append(f"| `{' '.join(words)}` | {needed}{action.help} |")
    if rows:
        yield "\n".join(["| argument | meaning |", "|---|---|", *rows, ""])


def resolve(module: str) -> list[Any]:
    """Return the public names of a module, which may import them when they are first used."""
    return [getattr(import_module(module), name) for name in PUBLIC[module]]


def write_html(folder: str) -> None:
    """Write a page for each module with public names."""
    from pdoc import pdoc
    from pdoc.render import configure

    for name, public in PUBLIC.items():
        module = import_module(name)
        vars(module).update(zip(public, resolve(name), strict=True), __all__=public)
    configure(docformat="google", include_undocumented=False, show_source=False)
    pdoc(*PUBLIC, output_directory=Path(folder))


def main(argv: Sequence[str]) -> None:
    if argv:
        write_html(*argv)
        return
    FIELDS.write_text(fields_page())
    COMMANDS.write_text(commands_page())
    SOURCES.write_text(sources_page())


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main(sys.argv[1:])
