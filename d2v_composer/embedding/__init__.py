"""Embed a collection into a file, or the columns of a table."""
