"""Turn embeddings into accuracies."""
