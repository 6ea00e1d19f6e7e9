"""Loggers for Composer's Trainer."""

from d2v_composer.loggers.jsonl import JSONLLogger

__all__ = ["JSONLLogger"]
