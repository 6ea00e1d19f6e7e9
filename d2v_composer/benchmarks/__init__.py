"""Measurements of ``d2v benchmark``, one module for each subcommand."""
