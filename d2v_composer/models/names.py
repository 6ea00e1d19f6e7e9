"""Choices for YAMLs and command lines, and the names of embeddings.

This module does not import torch, so that ``--help`` can show the choices within a second.
"""

from reprlib import repr as short  # a list in a file may hold another one a million times
from typing import Literal, get_args

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
EMBEDDING = "embedding"
"""Name of the embedding for which a model is used: a teacher's own, a student's estimate of it or, of a student without
an alignment, one of its raw embeddings."""
JOINT = "joint"
"""Name of the image embedding that a teacher shares with a text tower, such as CLIP's after its projection."""
Pooling = Literal["cls", "mean", "mean_patches"]
Representation = Literal["output", "layer_mean"]
MadeBy = Literal["teacher", "alignment", "training", "raw"]
"""What makes an embedding: a teacher; a student's alignment, fitted or trained; or a student without an alignment."""
PrecisionName = Literal["fp32", "amp_bf16", "amp_fp16"]
PrecisionChoice = Literal["auto", "fp32", "amp_fp16", "amp_bf16"]
"""``auto``: see :func:`~d2v_composer.models.precision.name_precision`."""
Prediction = Literal["layer_mean", "last_block"]
"""What is regressed to the target: norm_mean of the student's FFN outputs, or the last block's output."""
Normalization = Literal["instance", "layer"]
"""Normalization of each layer before the average.

``instance`` is over tokens, as in data2vec 2.0 (fairseq's ``instance_norm_target_layer``). ``layer`` is over channels
(fairseq's ``layer_norm_target_layer``), and keeps each channel's mean over tokens, which mean pooling uses.
"""
TargetSource = Literal["ffn", "block"]
"""Layers of the target: the teacher's FFN outputs, or its blocks' outputs."""
ExtraTokens = Literal["regress", "drop"]
"""What becomes of CLS and registers in the loss."""
Weights = Literal["model", "ema"]
"""Weights to take from a teacher's file: the trained weights, or their exponential moving average."""


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise ValueError, with the name of the option, unless the value is one of a Literal's values."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {short(value)}")


RAW_EMBEDDINGS = [f"{kind}_{pooling}" for kind in get_args(Representation) for pooling in get_args(Pooling)]
"""The names ``{representation}_{pooling}``; a model without CLS lacks those with the pooling ``cls``."""


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
