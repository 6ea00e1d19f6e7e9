"""Embeddings of a collection, and of the columns of a table."""
