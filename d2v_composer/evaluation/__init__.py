"""Measure the quality of embeddings."""
