"""Algorithms for Composer's Trainer."""

from d2v_composer.algorithms.gradient_norm import GradientNorm

__all__ = ["GradientNorm"]
