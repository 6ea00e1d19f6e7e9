"""Every field of a YAML for recipes/evaluate.py."""

from dataclasses import dataclass

from d2v_composer.config.limits import limited
from d2v_composer.config.schema import LookupConfig, ModelConfig, RunConfig, is_here

__all__ = ["EvaluateConfig"]


@dataclass
class EvaluateConfig(RunConfig, LookupConfig, ModelConfig):
    """Fields of recipes/evaluate.py."""

    out: str | None = limited(None, check=is_here)
    """Folder for evaluation.json and evaluation.csv."""
