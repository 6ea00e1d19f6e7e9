"""Embeddings → accuracies."""
