"""A model's embeddings: a representation, pooled. This module imports no torch, so ``--help`` takes no second."""

import re
from collections.abc import Collection
from typing import Any, NamedTuple, get_args

from d2v_composer.models.configs import check_choice
from d2v_composer.models.names import Pooling, Representation

PROJECTED = "projected_cls"
"""The embedding in the space of the teacher's own image embedding, whatever it pools."""


class Embedding(NamedTuple):
    """An embedding; by default that of a file without a run's record, with which data2vec 2.0 base retrieves best."""

    representation: Representation = "output"
    pooling: Pooling = "cls"

    @property
    def name(self) -> str:
        """Name in metrics, such as layer_mean_cls; ``projected`` has a pooling of its own."""
        return PROJECTED if self.representation == "projected" else "_".join(self)

    @classmethod
    def parse(cls, fields: Any) -> "Embedding":
        """Read ``representation`` and ``pooling`` from a mapping; other keys are ignored.

        Raises:
            LookupError, TypeError, ValueError: One is missing or unknown.
        """
        check_choice("representation", fields["representation"], Representation)
        check_choice("pooling", fields["pooling"], Pooling)
        return cls(fields["representation"], fields["pooling"])


ALL = (Embedding(each, pooling) for each in get_args(Representation) for pooling in get_args(Pooling))
EMBEDDINGS = [*dict.fromkeys(embedding.name for embedding in ALL)]
"""The names of all embeddings; without CLS, a model lacks the first of each representation."""


def find_primary(primary: str, names: Collection[str]) -> str:
    """Return the name of the embedding to report as a model's primary embedding.

    Args:
        primary: The embedding asked for. For ``layer_mean`` and ``projected``, the output will do: the bare encoder has
            neither.
        names: The model's embeddings; a single one without a name ('') is its own primary embedding.

    Raises:
        ValueError: The model has no such embedding.
    """
    for name in (primary, re.sub("^(layer_mean|projected)", "output", primary), "output_mean_patches", ""):
        if name in names:
            return name
    raise ValueError(f"primary embedding must be one of {', '.join(names)}, got {primary!r}")
