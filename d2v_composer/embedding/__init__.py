"""Embed samples into a file or a table's columns, search the embeddings, and align a student with them."""
