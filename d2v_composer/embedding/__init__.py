"""Embed samples, search the embeddings, and align a student with other embeddings."""
