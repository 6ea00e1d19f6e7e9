"""READMEs: links lead somewhere, every YAML field is listed, the tree is the real one, the front page is short."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2v_composer.config.load import find_section
from d2v_composer.config.schema import EvaluateConfig, FinetuneConfig, LabeledSetConfig, Section, TrainConfig
from helpers import ROOT

READMES = [
    *ROOT.glob("*.md"),
    *(
        path
        for folder in ("recipes", "yamls", "tests", "d2v_composer")
        for path in sorted((ROOT / folder).glob("**/*.md"))
    ),
]


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a file's headings."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(readme: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", readme.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (readme.parent / path).resolve() if path else readme
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_in_commands_and_tables_exist(readme: Path) -> None:
    named = re.findall(r"\b((?:recipes|yamls|tests|d2v_composer)/[\w/.-]+\.(?:py|yaml|md))\b", readme.read_text())
    assert [name for name in named if not (ROOT / name).exists() and "NAME" not in name] == []


def keys(schema: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted keys of a config, without those of the user's own names."""
    for name, field in schema.model_fields.items():
        section = find_section(field.annotation)
        if section is not None and "dict" not in str(field.annotation):
            yield from keys(section, f"{prefix}{name}.")
        else:
            yield prefix + name


def listed(title: str) -> list[str]:
    """The keys in the table of a section of yamls/README.md."""
    section = (ROOT / "yamls" / "README.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\|([^|]*)\|", section, flags=re.MULTILINE)
    return sorted(key for row in rows for key in re.findall("`(.*?)`", row))


@pytest.mark.parametrize(
    ("schema", "title"),
    [(TrainConfig, "Training"), (EvaluateConfig, "Evaluation"), (LabeledSetConfig, "Labeled sets")],
)
def test_every_field_is_listed_once_and_no_other(schema: type[Section], title: str) -> None:
    assert listed(title) == sorted(keys(schema))


def test_the_fields_of_a_finetuning_alone_are_listed_once() -> None:
    assert listed("Fine-tuning") == sorted({*keys(FinetuneConfig)} - {*keys(TrainConfig)})


def test_the_tree_is_the_real_one() -> None:
    tree = (ROOT / "CONTRIBUTING.md").read_text().split("## The code")[1].split("```")[1]
    rooms = re.findall(r"^  (\w+(?:/|\.py))", tree, flags=re.MULTILINE)
    package = ROOT / "d2v_composer"
    folders = [f"{path.parent.name}/" for path in package.glob("*/__init__.py")]
    assert sorted(rooms) == sorted([*folders, *(path.name for path in package.glob("[!_]*.py"))])
