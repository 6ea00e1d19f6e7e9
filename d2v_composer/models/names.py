"""Choices for YAMLs and command lines, and the names of embeddings, each a representation and a pooling.

This module imports no torch, so ``--help`` shows them within a second.
"""

import re
from collections.abc import Collection
from reprlib import repr as short  # a list in a file may hold another one a million times
from typing import Any, Literal, NamedTuple, get_args

DATA2VEC2 = "data2vec2"
"""Default of ``teacher.model``."""
TIMM_PREFIX = "timm/"
"""Prefix of a timm model's name."""
PACKAGE_PREFIX = "ext/"
"""Prefix of the name of a teacher, callback or logger that an installed package offers, or of a teacher that
``train_student`` is given."""
ENTRY_POINTS = "d2v_composer.teachers"
"""Group of entry points: each is called with ``teacher.checkpoint`` and returns a teacher."""
CALLBACKS_GROUP = "d2v_composer.callbacks"
"""Group of entry points: each is called with a YAML's arguments and returns a Composer callback or logger."""
PROJECTED = "projected_cls"
"""Name of the embedding in the space of another model's, such as the teacher's own image embedding, however pooled."""
Pooling = Literal["cls", "mean", "mean_patches"]
Representation = Literal["output", "layer_mean", "projected"]
PrecisionName = Literal["fp32", "amp_bf16", "amp_fp16"]
PrecisionChoice = Literal["auto", "fp32", "amp_fp16", "amp_bf16"]
"""``auto`` is the fastest that the machine has instructions for."""
Prediction = Literal["layer_mean", "last_block"]
"""What is regressed to the target: norm_mean of the student's FFN outputs, or the last block's output."""
Normalization = Literal["instance", "layer"]
"""Normalization of each layer before the average.

``instance`` is over time (fairseq's ``instance_norm_target_layer``, the image models'). ``layer`` is over channels
(``layer_norm_target_layer``): it keeps each channel's mean over time, which a mean pooling sees.
"""
TargetNormalization = Literal["instance", "layer", "dataset"]
"""Normalization of each layer of a target; ``dataset`` is by a fixed mean and deviation of each layer and channel."""
TargetSource = Literal["ffn", "block"]
"""Layers of the target: the teacher's FFN outputs, or its blocks' outputs."""
TokenLoss = Literal["mse", "cosine_smooth_l1"]
"""Distance of a token's prediction from its target."""
ExtraTokens = Literal["regress", "drop", "only"]
"""What becomes of CLS and registers in the loss."""
Weights = Literal["model", "ema"]
"""Weights of a teacher's file: the trained ones, or their moving average."""


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ValueError, with the name of the option, unless the value is one of a Literal's values."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {short(value)}")


class Embedding(NamedTuple):
    """An embedding; the default is for files without a run's record: data2vec 2.0 base retrieves best with it."""

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
            LookupError, TypeError, ValueError: A key is missing, or its value unknown.
        """
        check_choice("representation", fields["representation"], Representation)
        check_choice("pooling", fields["pooling"], Pooling)
        return cls(fields["representation"], fields["pooling"])


EMBEDDINGS = [
    *dict.fromkeys(Embedding(kind, pooling).name for kind in get_args(Representation) for pooling in get_args(Pooling))
]
"""The names of all embeddings; a model without CLS lacks those with the pooling ``cls``."""


def find_primary(primary: str, names: Collection[str]) -> str:
    """Return the name of the embedding to report as a model's primary embedding.

    Args:
        primary: The embedding asked for. In place of ``layer_mean`` or ``projected``, which the encoder alone lacks,
            ``output`` is found.
        names: The model's embeddings; a single one without a name ('') is its own primary embedding.

    Raises:
        ValueError: The model has no such embedding.
    """
    for name in (primary, re.sub("^(layer_mean|projected)", "output", primary), "output_mean_patches", ""):
        if name in names:
            return name
    raise ValueError(f"primary embedding must be one of {', '.join(names)}, got {primary!r}")


def timm_name(model: str) -> str:
    """Return the NAME of ``timm/NAME``.

    Raises:
        ValueError: The name has another form, or timm has no such model.
    """
    import timm  # takes seconds

    name = model.removeprefix(TIMM_PREFIX)
    if name == model or not timm.is_model(name):
        raise ValueError(f"no model {model!r}; expected timm/NAME, with NAME from timm.list_models()")
    return name
