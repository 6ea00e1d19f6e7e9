"""Pages: links, files, commands, keys and messages are right, and generated tables are today's."""

import ast
import re
import runpy
import shlex
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import dropwhile, groupby
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

import reference
from d2v_composer.commands.__main__ import COMMANDS
from d2v_composer.commands.fields import main as print_fields
from d2v_composer.config import schema as fields
from d2v_composer.config.load import (
    find_section,
    load_config,
    load_evaluate_config,
)
from d2v_composer.config.schema import EvaluateConfig, LabeledSetConfig, TrainConfig
from d2v_composer.models import precision
from d2v_composer.system import fetch
from d2v_composer.system.errors import InputError
from helpers import ROOT
from recipes.ablations import Ablations

FOLDERS = (".github", "recipes", "yamls", "tests", "d2v_composer")
PAGES = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("**/*.md"))])
SCHEMAS = (TrainConfig, EvaluateConfig)
# Reader of a YAML → how it is checked, and the YAML that stands for one that is not in the repository.
READERS = {
    "train": (load_config, "yamls/distill.yaml"),
    "train.py": (load_config, "yamls/distill.yaml"),
    "own_teacher.py": (load_config, "yamls/quickstart.yaml"),
    "run.py": (load_config, "yamls/distill.yaml"),
    "evaluate": (load_evaluate_config, "yamls/evaluate.yaml"),
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a file's headings."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@each_page
def test_named_files_exist(page: Path) -> None:
    named = re.findall(r"\b((?:recipes|yamls|tests|d2v_composer)/[\w/.-]+\.(?:py|yaml|md|ipynb))\b", page.read_text())
    assert [name for name in named if not (ROOT / name).exists() and "NAME" not in name] == []


def keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a config and of its sections, without those of the user's own names."""
    for name, field in schema.model_fields.items():
        section = find_section(field.annotation)
        yield prefix + name
        if section is not None and get_origin(field.annotation) is not dict:
            yield from keys(section, f"{prefix}{name}.")


@each_page
def test_dotted_keys_exist(page: Path) -> None:
    known = {key for schema in SCHEMAS for key in keys(schema)}
    free = ("callbacks.", "loggers.", "retrieval.datasets.", "datasets.", "dotted.key")
    named = re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_]+)+)=", page.read_text())
    assert [key for key in named if key not in known and not key.startswith(free)] == []


# Script → how many arguments it may have.
POSITIONALS = {"ray_embed.py": (3, 4), "embed_onnx.py": (3,)}
# Scripts whose parser is a public name.
PARSERS = ("benchmark.py", "detect.py", "finetune.py")
# Suffix of a file → its lines of shell.
SHELL = {
    ".md": r"^```(?:sh|bash|console)\n((?s:.*?))^```",
    ".yaml": r"^#   ((?:d2v|composer|python) .*)$",
    ".sh": r"^([^#\n](?:.*\\\n)*.*)$",
}
PROGRAM = re.compile(r"d2v|d2v_composer\.commands|(\.?/)?recipes/(launch/)?\w+\.py")


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command in a page's shell, a YAML's header or a script, from ``d2v`` or a recipe on."""
    for block in re.findall(SHELL[page.suffix], page.read_text(), flags=re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars=True)
            words.whitespace_split = True
            for is_separator, part in groupby(words, lambda word: re.fullmatch(r"[();<>|&]+", word) is not None):
                command = [*dropwhile(lambda word: not PROGRAM.fullmatch(word), part)]
                if command and not is_separator:
                    yield [word for word in command if "…" not in word]


def problems(program: str, argv: Sequence[str]) -> Iterator[str]:
    """The problems that a command line of ours would report before it does anything."""
    name, *arguments = [program.rpartition("/")[2], *argv] if program.endswith(".py") else argv or ["--help"]
    if "--help" in (name, *arguments) or name == "--version":
        return
    changes: Sequence[str] = ()
    try:
        if name in READERS:
            load, shipped = READERS[name]
            is_yaml = bool(arguments) and "=" not in arguments[0]
            given = arguments[0] if is_yaml and (ROOT / arguments[0]).exists() else shipped
            load([str(ROOT / given), *arguments[is_yaml:]])
        elif name == "ablations.py":
            changes = [word for word in Ablations.parse(arguments).given if "=" in word]
        elif name in POSITIONALS:
            if len(arguments) not in POSITIONALS[name]:
                yield f"expected MODEL SOURCE OUT, got {arguments}"
        elif name in PARSERS:
            runpy.run_path(str(ROOT / "recipes" / name))["parser"].parse_args(arguments)
        elif (name := name.replace("ray_convert.py", "convert-images")) in COMMANDS:
            kind = reference.find_command(f"d2v_composer/commands/{name.replace('-', '_')}.py")
            changes = getattr(kind.parse(arguments), "changes", ()) if kind is not None else ()
        else:
            yield f"no command {name}"
        if changes:
            load_config([str(ROOT / "yamls/distill.yaml"), *changes])
    except SystemExit:
        yield "its parser refuses this"
    except InputError as error:
        yield from (line for line in map(str, error.args) if not re.search("got '[A-Z]+'$", line))  # such as N


@pytest.mark.parametrize(
    "page",
    [*PAGES, *sorted((ROOT / "yamls").rglob("*.yaml")), ROOT / "yamls" / "ablations" / "commands.sh"],
    ids=name_of,
)
def test_commands_are_right(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fields, precision):
        monkeypatch.setattr(module, "has_gpu", lambda: True)
    monkeypatch.setattr(fetch, "find_missing_file", lambda address: None)
    wrong = {shlex.join(command): list(problems(command[0], command[1:])) for command in commands(page)}
    assert {command: lines for command, lines in wrong.items() if lines} == {}


@each_page
def test_python_imports_what_exists(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(block.replace("…", "..."))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("d2v_composer"):
                assert [
                    alias.name for alias in node.names if not hasattr(import_module(node.module or ""), alias.name)
                ] == []


def test_generated_pages_are_todays() -> None:
    """If this fails, run ``python tests/reference.py``."""
    assert reference.fields_page() == reference.FIELDS.read_text()
    assert reference.commands_page() == reference.COMMANDS.read_text()
    assert reference.sources_page() == reference.SOURCES.read_text()


def test_d2v_fields_prints_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    print_fields(["optimizer"])
    printed = capsys.readouterr().out
    assert "| `optimizer.betas` | `[0.9, 0.98]` |" in printed
    assert "train_loader" not in printed
    with pytest.raises(InputError, match=r"SECTION: .*'optimiser' \(allowed: training, train_loader, "):
        print_fields(["optimiser"])


def sections(schema: type[BaseModel]) -> set[type[BaseModel]]:
    subsections = {section for field in schema.model_fields.values() if (section := find_section(field.annotation))}
    return subsections.union({schema}, *map(sections, subsections))


def choices(annotation: object) -> set[str]:
    """The texts that a field's type allows."""
    if get_origin(annotation) is Literal:
        return {choice for choice in get_args(annotation) if isinstance(choice, str)}
    return set().union(*map(choices, get_args(annotation)))


def test_every_field_is_described_with_its_choices() -> None:
    for schema in set().union(*map(sections, (*SCHEMAS, LabeledSetConfig))):
        for name, field in schema.model_fields.items():
            section, about = find_section(field.annotation), field.description or ""
            assert about or section not in (None, LabeledSetConfig), f"{schema.__name__}.{name}"
            missing = {choice for choice in choices(field.annotation) if choice not in about}
            assert not missing, f"{schema.__name__}.{name}: {missing}"


def test_the_tree_is_the_real_one() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("## The code")[1].split("```")[1]
    rooms = re.findall(r"^  (\w+(?:/|\.py))", tree, flags=re.MULTILINE)
    package = ROOT / "d2v_composer"
    folders = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert sorted(rooms) == sorted([*folders, *(path.name for path in package.glob("[!_]*.py"))])


def texts(path: Path) -> Iterator[str]:
    """Yield each text in a source file, an f-string with what its braces choose from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant | ast.JoinedStr):
            values = [getattr(part, "value", None) for part in ast.walk(node)]
            yield "".join(value for value in values if isinstance(value, str))


def test_the_messages_of_the_troubleshooting_guide_are_printed() -> None:
    guide = (ROOT / "recipes" / "guides" / "troubleshooting.md").read_text()
    listed = guide.split("## By message")[1].split("## By symptom")[0]
    messages = re.findall(r"^\| `(.+?)` \|", listed, flags=re.MULTILINE)
    assert len(messages) == sum(line.startswith("| `") for line in listed.splitlines()) > 0
    paths = [path for folder in ("d2v_composer", "recipes") for path in (ROOT / folder).rglob("*.py")]
    printed = [text for path in paths for text in texts(path)]
    for message in messages:
        parts = [part for part in message.split("…") if part.strip(":;, ")]
        assert any(all(part in text for part in parts) for text in printed), message
