"""Choices for YAMLs and command lines. This module imports no torch, so ``--help`` shows them within a second."""

from typing import Literal

DATA2VEC2 = "data2vec2"
"""Default of ``teacher.model``."""
PREFIX = "timm/"
"""Prefix of a timm model's name."""
Pooling = Literal["cls", "mean", "mean_patches"]
Representation = Literal["output", "layer_mean"]
PrecisionName = Literal["fp32", "amp_bf16", "amp_fp16"]
PrecisionChoice = Literal["auto", "fp32", "amp_fp16", "amp_bf16"]
"""``auto`` is the fastest that the machine has instructions for."""
Prediction = Literal["layer_mean", "last_block"]
"""What is regressed to the target: norm_mean of the student's FFN outputs, or the last block's output."""
Weights = Literal["model", "ema"]
"""Weights of a teacher's file: the trained ones, or their moving average."""
