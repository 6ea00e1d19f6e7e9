"""Names of models, entry points and embeddings, and choices for YAMLs and command lines.

Importing this module does not import torch.
"""

from reprlib import repr as short  # a list in a file may hold another one a million times
from typing import Literal, get_args

DATA2VEC2 = "data2vec2"
"""Default of ``teacher.model``."""
TIMM_PREFIX = "timm/"
"""Prefix of a timm model's name."""
PACKAGE_PREFIX = "ext/"
"""Prefix of the name of a teacher, callback or logger from outside this package."""
ENTRY_POINTS = "d2v_composer.teachers"
"""Group of entry points, each a function that takes ``teacher.checkpoint`` and returns a teacher."""
CALLBACKS_GROUP = "d2v_composer.callbacks"
"""Group of entry points, each a callable that returns a Composer callback or logger."""
EMBEDDING = "embedding"
"""Name of the embedding that a model's ``embed`` returns by default."""
JOINT = "joint"
"""Name of the embedding that the head of a timm model computes, such as CLIP's image embedding."""
Pooling = Literal["cls", "mean", "mean_patches"]
Representation = Literal["output", "layer_mean"]
MadeBy = Literal["teacher", "alignment", "training", "raw"]
"""What makes an embedding: a teacher, a fitted alignment, a trained alignment, or a student without an alignment."""
PrecisionName = Literal["fp32", "amp_bf16", "amp_fp16"]
PrecisionChoice = Literal["auto", "fp32", "amp_fp16", "amp_bf16"]
"""``auto``: see :func:`~d2v_composer.models.precision.name_precision`."""
Prediction = Literal["layer_mean", "last_block"]
"""Prediction of the target: the mean of the student's normalized FFN outputs, or the last block's output."""
Normalization = Literal["instance", "layer"]
"""Normalization of each layer before the average: ``instance``, over tokens, or ``layer``, over channels."""
TargetSource = Literal["ffn", "block"]
"""What the target averages: the FFN outputs of the teacher's blocks, or the blocks' outputs."""
ExtraTokens = Literal["regress", "drop"]
"""Treatment of CLS and registers; see :class:`~d2v_composer.models.configs.TargetOptions`."""
Weights = Literal["model", "ema"]
"""Weights to take from a teacher's file: the trained weights, or their exponential moving average."""


def check_choice(name: str, value: object, choices: object) -> None:
    """Raise ValueError unless the value is in ``choices``, a Literal."""
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {short(value)}")


RAW_EMBEDDINGS = [f"{kind}_{pooling}" for kind in get_args(Representation) for pooling in get_args(Pooling)]
"""Names of raw embeddings, ``{representation}_{pooling}``."""


def timm_name(model: str) -> str:
    """Return NAME, given ``timm/NAME``."""
    import timm  # takes seconds

    name = model.removeprefix(TIMM_PREFIX)
    if name == model or not timm.is_model(name):
        raise ValueError(f"no model {model!r}; expected timm/NAME, with NAME from timm.list_models()")
    return name
