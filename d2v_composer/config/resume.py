"""Marks of a YAML's fields: what a resume does if a field has changed."""

from collections.abc import Iterator
from enum import Enum, auto

from pydantic import BaseModel


class OnResume(Enum):
    """Effect on a resume of a field whose value differs from the checkpoint's. Without a mark, the run goes on."""

    FIXED = auto()
    """The resume is refused: it would ignore the change, or silently mix old and new samples or targets."""
    FIXED_IF_COMPARED = auto()
    """The resume is refused if the loss compares the inputs of a microbatch with each other."""
    NEW_TARGETS = auto()
    """The run goes on, but computes again the targets that it has stored."""
    NEW_RESULT = auto()
    """The run goes on, to another result; ``d2v distill`` refuses the change: its OUT has the result of one command."""


FIXED, FIXED_IF_COMPARED, NEW_TARGETS, NEW_RESULT = OnResume


def keys_marked(section: BaseModel, mark: OnResume) -> Iterator[str]:
    """Yield the dotted key of each field with a mark, in a section and in the sections in it."""
    for name, field in type(section).model_fields.items():
        if mark in field.metadata:
            yield name
        elif isinstance(value := getattr(section, name), BaseModel):
            yield from (f"{name}.{key}" for key in keys_marked(value, mark))
