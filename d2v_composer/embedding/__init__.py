"""Images → files of embeddings."""
