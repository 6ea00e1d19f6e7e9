"""Runs, from a config to their end."""
