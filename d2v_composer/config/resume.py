"""Marks of a YAML's fields, which say what a resume does if a field's value has changed."""

from collections.abc import Iterator
from enum import Enum, auto

from pydantic import BaseModel


class OnResume(Enum):
    """Ways in which a resume treats a field whose value differs from the value in the checkpoint."""

    FIXED = auto()
    """The resume is refused."""
    NEW_RESULT = auto()
    """The run goes on, unless ``d2v distill`` started it: then the resume is refused."""


FIXED, NEW_RESULT = OnResume


def keys_marked(section: BaseModel, mark: OnResume) -> Iterator[str]:
    """Yield the dotted key of each field with a mark, in a section and its subsections."""
    for name, field in type(section).model_fields.items():
        if mark in field.metadata:
            yield name
        elif isinstance(value := getattr(section, name), BaseModel):
            yield from (f"{name}.{key}" for key in keys_marked(value, mark))
