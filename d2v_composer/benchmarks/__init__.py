"""Measurements of ``recipes/benchmark.py``, one module for each subcommand."""
