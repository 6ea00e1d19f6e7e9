"""Rehearse a run before it costs a week: ``recipes/preflight.py``."""

from d2v_composer.preflight.preflight import preflight

__all__ = ["preflight"]
