"""The named choices of YAMLs and command lines, in a module that imports nothing: ``--help`` need not import torch."""

from typing import Literal

__all__ = ["DATA2VEC2", "Pooling", "PrecisionChoice", "PrecisionName", "Representation", "Weights"]

DATA2VEC2 = "data2vec2"
"""The default of ``teacher.model``; others are timm's."""
Pooling = Literal["cls", "mean", "mean_patches"]
Representation = Literal["output", "layer_mean"]
PrecisionName = Literal["fp32", "amp_bf16", "amp_fp16"]
PrecisionChoice = Literal["auto", "fp32", "amp_fp16", "amp_bf16"]
"""``auto`` is the fastest that the machine has instructions for."""
Weights = Literal["model", "ema"]
"""Of a teacher's file: the trained ones, or their moving average."""
