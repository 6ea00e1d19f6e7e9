"""Loggers for Composer's Trainer."""

from d2v_composer.loggers.jsonl import JSONLLogger
from d2v_composer.loggers.progress import Progress

__all__ = ["JSONLLogger", "Progress"]
