"""Distil a frozen, self-supervised data2vec 2.0 image teacher into a small student, with Composer."""

from d2v_composer.models.load import load_student, load_teacher

__all__ = ["load_student", "load_teacher"]
__version__ = "0.1.0"
