"""The headline of a run: the embedding by which it is judged, ``retrieval.representation`` and ``retrieval.pooling``.

An exported student keeps it in its provenance, the run's record.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from d2v_composer.models.names import Pooling, Representation
from d2v_composer.models.transformer import Transformer
from d2v_composer.system.errors import InputError

__all__ = ["DEFAULT_HEADLINE", "ChosenEmbedding", "Headline", "choose_embedding", "parse_headline", "stored_headline"]


class Headline(NamedTuple):
    """One of a model's embeddings."""

    representation: Representation
    pooling: Pooling

    @property
    def name(self) -> str:
        """The name in metrics, such as layer_mean_cls."""
        return f"{self.representation}_{self.pooling}"


DEFAULT_HEADLINE = Headline("output", "cls")
"""Of a file without the record of a run, such as a teacher's: data2vec 2.0 base retrieves best with it."""


class ChosenEmbedding(NamedTuple):
    """The embedding that a command computes."""

    headline: Headline
    origin: str

    def __str__(self) -> str:
        return f"{self.headline.name} ({self.origin})"


def choose_embedding(
    model: Transformer, provenance: Mapping[str, Any], pooling: Pooling | None, representation: Representation | None
) -> ChosenEmbedding:
    """Choose the embedding asked for, or else the headline of the model's run.

    Args:
        model: A student or a teacher.
        provenance: The model's.
        pooling: As asked for; ``None``: the headline's.
        representation: As asked for; ``None``: the headline's.

    Raises:
        InputError: ``pooling`` is cls, and the model has no CLS token.
    """
    if pooling == "cls" and not model.has_cls_token:
        raise InputError("pooling: this model has no CLS token; allowed are mean, mean_patches")
    stored = stored_headline(provenance)
    headline = stored or DEFAULT_HEADLINE
    if headline.pooling == "cls" and not model.has_cls_token:
        headline = headline._replace(pooling="mean_patches")
    asked = {"pooling": pooling, "representation": representation}
    if all(asked.values()):
        origin = "as asked"
    elif stored is None:
        origin = "the default, since the file has no record of a run"
    else:
        origin = "the headline of the model's run"
    given = [option for option, value in asked.items() if value is not None]
    if len(given) == 1:
        origin += f", but {given[0]} as asked"
    return ChosenEmbedding(Headline(representation or headline.representation, pooling or headline.pooling), origin)


def stored_headline(provenance: Mapping[str, Any]) -> Headline | None:
    """Return the headline in the record of a model's run; ``None`` without a record that names one."""
    config = provenance.get("config")
    retrieval = config.get("retrieval") if isinstance(config, Mapping) else None
    for fields in (retrieval, provenance.get("model")):  # of a distillation, of a fine-tuning
        try:
            return parse_headline(fields)
        except ValueError:  # a record of another program
            continue
    return None


def parse_headline(fields: Any) -> Headline:
    """Read ``representation`` and ``pooling`` from a mapping; others may be there too.

    Raises:
        ValueError: One is missing or unknown.
    """
    if not isinstance(fields, Mapping):
        raise ValueError(f"a headline must be an object, got {type(fields).__name__}")
    representation, pooling = fields.get("representation"), fields.get("pooling")
    for value, allowed in ((representation, get_args(Representation)), (pooling, get_args(Pooling))):
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}, got {str(value)[:50]!r}")
    return Headline(representation, pooling)  # pyright: ignore[reportArgumentType]: checked above
