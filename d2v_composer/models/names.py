"""Choices for YAMLs and command lines. This module imports no torch, so ``--help`` shows them within a second."""

from typing import Literal

DATA2VEC2 = "data2vec2"
"""Default of ``teacher.model``."""
PREFIX = "timm/"
"""Prefix of a timm model's name."""
EXTERNAL = "ext/"
"""Prefix of a teacher's name that is an installed package's, or that ``train_student`` is given."""
TEACHERS = "d2v_composer.teachers"
"""Group of entry points: each is called with ``teacher.checkpoint`` and returns a teacher."""
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
"""The same of a target; ``dataset`` is by fixed numbers of each layer and channel."""
TargetSource = Literal["ffn", "block"]
"""Layers of the target: the teacher's FFN outputs, or its blocks' outputs."""
TokenLoss = Literal["mse", "cosine_smooth_l1"]
"""Distance of a token's prediction from its target."""
ExtraTokens = Literal["regress", "drop", "only"]
"""What becomes of CLS and registers in the loss."""
Weights = Literal["model", "ema"]
"""Weights of a teacher's file: the trained ones, or their moving average."""


def timm_name(model: str) -> str:
    """Return the NAME of ``timm/NAME``.

    Raises:
        ValueError: It has another form, or timm has no such model.
    """
    import timm  # takes seconds

    name = model.removeprefix(PREFIX)
    if name == model or not timm.is_model(name):
        raise ValueError(f"no model {model!r}; expected timm/NAME, with NAME from timm.list_models()")
    return name
