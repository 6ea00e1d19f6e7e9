"""Print the fields of the YAMLs, with their defaults and descriptions, as Markdown tables.

    d2v fields
    d2v fields optimizer

SECTION is training, evaluation, datasets, or a section of a YAML, such as optimizer.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from d2v_composer.commands.command import Command, Positional
from d2v_composer.system.errors import InputError

HEAD = "| key | default | description |\n|---|---|---|"


class Fields(Command):
    section: Positional[str | None] = None
    """Section whose fields are printed; default: all sections."""

    def run(self) -> None:
        tables = list(find_tables())
        if not (texts := [text for *names, text in tables if self.section in (None, *names)]):
            allowed = dict.fromkeys(name for *names, _ in tables for name in names)
            raise InputError(f"SECTION: no such section {self.section!r} (allowed: {', '.join(filter(None, allowed))})")
        print("\n\n".join(texts))


main = Fields.main


def find_tables() -> Iterator[tuple[str, str, str]]:
    """Yield, for each section, the kind of YAML (such as 'training'), the section's name and a table in Markdown.

    The name is '' for the fields outside of sections. Fields of another kind of YAML that are the same as in training
    are only named.
    """
    from d2v_composer.config.load import find_section
    from d2v_composer.config.schema import EvaluateConfig, LabeledSetConfig, TrainConfig

    def find_rows(schema: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
        for name, field in schema.model_fields.items():
            if about := field.description:
                text = json.dumps(field.default, default=lambda _: {}).replace('"', "")  # {}: a section's fields follow
                default = "required" if field.is_required() else "`" + re.sub(r"(\.\d{4})\d+", r"\1", text) + "`"
                yield prefix + name, f"| `{prefix}{name}` | {default} | {' '.join(about.split())} |"
            if (section := find_section(field.annotation)) not in (None, LabeledSetConfig):
                yield from find_rows(section, f"{prefix}{name}.")

    training = set(find_rows(TrainConfig))
    readers = {
        "evaluation": EvaluateConfig,
        "datasets": LabeledSetConfig,
    }
    for reader, schema in {"training": TrainConfig, **readers}.items():
        sections, shared = {"": list[str]()}, list[str]()
        for key, row in find_rows(schema):
            if reader != "training" and (key, row) in training:
                shared.append(f"`{key}`")
            else:
                sections.setdefault(key.partition(".")[0] if "." in key else "", []).append(row)
        for section, rows in sections.items():
            about = f"## {reader.capitalize()}\n\n{schema.__doc__}"
            about += f" These fields are the same as in training: {', '.join(shared)}." if shared else ""
            if section:
                about = f"### {section}\n\n{find_section(schema.model_fields[section].annotation).__doc__}"
            yield reader, section, "\n".join([f"{about}\n\n{HEAD}", *rows]).replace("``", "`")
