"""Checked values → the arguments of Composer's Trainer."""

from d2v_composer.builders.run import BuiltRun, build_run

__all__ = ["BuiltRun", "build_run"]
